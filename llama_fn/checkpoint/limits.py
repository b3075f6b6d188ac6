"""Checks that a small hostile file cannot cost much memory or time before it is refused.

A file describes itself in its size, its header or its directory. Each check here compares that description with the
real size of the file, or with a limit far above what any model needs, and raises `ValueError` that names the file.
With these checks, a refused file takes less memory than 64 MiB plus its own size.
"""

import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

MOST_HEADER = 2**22  # bytes of a safetensors header; that of LLaMA 2 70B has 90,000
MOST_PICKLE = 2**21  # bytes of the pickle in a torch file; a training state of LLaMA 3.1 405B has half a million
MOST_OPCODES = 2**18  # opcodes in that pickle; the same training state has 110,000
END, LOCATOR, END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
# Functions that a pickle may call: those that build tensors and dictionaries. torch allows a few more (bytearray,
# codecs, Tensor), but those can be told to allocate any amount of memory.
CALLED = re.compile(r"collections OrderedDict|torch\.serialization _get_layout|torch Size|torch device"
                    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|sparse_tensor|sparse_csr_tensor"
                    r"|nested_tensor|meta_tensor_no_storage)")
# Types that a pickle may mention but not call. To call a storage type with a number would allocate that much memory. A
# real file only mentions the type of each storage, together with the zip entry that holds its bytes.
NAMED = re.compile(r"torch(\.storage)? \w+Storage"
                   r"|torch (b?float\w*|double|half|complex\w*|q?u?int\w*|long|short|bool)")

# For each opcode of a pickle: how many values it pops, whether it pops everything above a mark too, and what it pushes.
OPCODES = {opcode.name: (sum(kind.name not in ("mark", "stackslice") for kind in opcode.stack_before),
                         any(kind.name == "mark" for kind in opcode.stack_before),
                         [kind.name for kind in opcode.stack_after])
           for opcode in pickletools.opcodes}


def check_size(path: str | os.PathLike, most: int) -> None:
    """Check a file that will be read whole: it has at most ``most`` bytes. A missing file passes this check."""
    path = Path(path)
    if path.is_file() and (size := path.stat().st_size) > most:
        raise ValueError(f"{path}: {size:,} bytes, at most {most:,} are read; is it the right file?")


def check_header(path: Path) -> None:
    """Check the length of a safetensors file's header, which lists the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(MOST_HEADER, path.stat().st_size - 8):
        raise ValueError(f"{path}: not a safetensors file, or a damaged one: a header of {length:,} bytes, "
                         f"at most {MOST_HEADER:,} are read, of a file of {path.stat().st_size:,}")


def check_torch_file(path: str | os.PathLike) -> None:
    """Check a file of `torch.save`: a zip archive of uncompressed entries, one of which is a pickle.

    No entry may be compressed, so that none unpacks to more than its own bytes. The pickle may call no function that
    allocates more memory than the pickle has bytes. Keys of dictionaries must be strings, because the hash of deeply
    nested tuples takes exponential time.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries, size = archive.infolist(), Path(path).stat().st_size
            _check_end(path, archive.start_dir, size)
            if packed := [entry.filename for entry in entries
                          if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size]:
                raise ValueError(f"{packed[0]} is compressed, as torch.save leaves nothing")
            if (claimed := sum(entry.file_size for entry in entries)) > size:
                raise ValueError(f"its entries have {claimed:,} bytes, and the file {size:,}")
            for entry in entries:
                if entry.filename.lower().endswith("data.pkl"):
                    if entry.file_size > MOST_PICKLE:
                        raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes, at most {MOST_PICKLE:,} are "
                                         "read; tensors belong in entries of their own")
                    _check_pickle(archive.read(entry))
    # These are what zipfile and struct raise for archives that are damaged, encrypted or of an unknown kind.
    except (ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, IndexError, KeyError, EOFError,
            struct.error) as error:
        raise ValueError(f"{path}: not a file of tensors, or a damaged one: {error}") from None


def _check_end(path: str | os.PathLike, directory: int, size: int) -> None:
    """Check that the archive ends as torch writes it, so that torch and Python find the same directory in it."""
    with open(path, "rb") as file:
        file.seek(max(0, size - END64.size - LOCATOR.size - END.size))
        tail = file.read()
    magic, *_, length, start, comment = END.unpack(tail[-END.size:])
    at = size - END.size
    if tail[-END.size - LOCATOR.size:][:4] == b"PK\6\7":
        at -= LOCATOR.size + END64.size
        _, _, found, _ = LOCATOR.unpack(tail[-END.size - LOCATOR.size:-END.size])
        sign, _, *_, length, start = END64.unpack(tail[:END64.size])
        if (sign, found) != (b"PK\6\6", at):
            raise ValueError("a zip archive with two ends")
    if magic != b"PK\5\6" or comment or start != directory or start + length != at:
        raise ValueError("a zip archive that does not end with its directory")


def _check_pickle(data: bytes) -> None:
    """Run through a pickle without building anything. The stack holds names of functions and types, not values."""
    below: list[list[str]] = []  # the stacks that were put aside at each open mark
    stack: list[str] = []
    memo: dict[int, str] = {}
    argument: Any  # its type depends on the opcode
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count > MOST_OPCODES:
            raise ValueError(f"a pickle of more than {MOST_OPCODES:,} opcodes")
        name, (popped, marked, pushed) = opcode.name, OPCODES[opcode.name]
        if name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            keys = stack[::2] if name == "SETITEMS" else stack[-2:-1] if name == "SETITEM" else ()
            if any(key != "str" for key in keys):
                raise ValueError("a dictionary with a key that is not a string")
            if name == "REDUCE" and stack[-2] == "collections OrderedDict" and stack[-1] != "EMPTY_TUPLE":
                raise ValueError("a dictionary that is made of a sequence")
            if name == "GLOBAL" and not (CALLED.fullmatch(argument) or NAMED.fullmatch(argument)):
                raise ValueError(f"{argument.replace(' ', '.')} has no place in a file of tensors")
            if name in ("REDUCE", "NEWOBJ") and not (name == "REDUCE" and CALLED.fullmatch(stack[-2])):
                raise ValueError(f"{stack[-2].replace(' ', '.')} is called, as torch.save never does")
            if marked:
                stack = below.pop()
            del stack[len(stack) - popped:]
            stack += [argument if name == "GLOBAL" else "EMPTY_TUPLE" if name == "EMPTY_TUPLE" else kind
                      for kind in pushed]
