"""What a file may claim: a small file must not take much memory or time before it is found to be wrong.

Each check reads a file's own account of itself (a directory, a header, a size) and compares it with the file's size, or
with a limit far above that of any model. Each raises `ValueError` that names the file. Together with them a refused
file takes less memory than 64 MiB and its own size.
"""

import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path

MOST_HEADER = 2**22  # bytes of a safetensors header; one of LLaMA 2 70B has 90,000
MOST_PICKLE = 2**21  # bytes of a torch file's pickle; a state of training of LLaMA 3.1 405B has half a million
MOST_STEPS = 2**18  # of that pickle, as it is unpickled; the same state has 110,000
END, LOCATOR, END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
# What builds tensors and dictionaries of them. Others that torch allows (bytearray, codecs, Tensor) take any size.
CALLED = re.compile(r"collections OrderedDict|torch\.serialization _get_layout|torch Size|torch device"
                    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|sparse_tensor|sparse_csr_tensor"
                    r"|nested_tensor|meta_tensor_no_storage)")
# What may be named, but not called: a storage of any size is one number. Those of a file are named beside its entry.
NAMED = re.compile(r"torch(\.storage)? \w+Storage"
                   r"|torch (b?float\w*|double|half|complex\w*|q?u?int\w*|long|short|bool)")

# By the name of a pickle's step: how many things it takes from the stack, whether all above a mark too, what it puts.
STEPS = {step.name: (sum(kind.name not in ("mark", "stackslice") for kind in step.stack_before),
                     any(kind.name == "mark" for kind in step.stack_before), [kind.name for kind in step.stack_after])
         for step in pickletools.opcodes}


def check_size(path: str | os.PathLike, most: int) -> None:
    """Of a file that is read as a whole. One that is not there is left to the reader."""
    path = Path(path)
    if path.is_file() and (size := path.stat().st_size) > most:
        raise ValueError(f"{path}: {size:,} bytes, at most {most:,} are read; is it the right file?")


def check_header(path: Path) -> None:
    """Of a safetensors file: the length of its header, which says what tensors there are."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(MOST_HEADER, path.stat().st_size - 8):
        raise ValueError(f"{path}: not a safetensors file, or a damaged one: a header of {length:,} bytes, "
                         f"at most {MOST_HEADER:,} are read, of a file of {path.stat().st_size:,}")


def check_torch_file(path: str | os.PathLike) -> None:
    """Of what `torch.save` writes: a zip archive of uncompressed entries, one of which is a pickle.

    Nothing is unpacked to more than its own bytes, and what the pickle builds grows with its length: it names no
    function that makes something large, and a dictionary's keys are strings (the hash of nested tuples takes forever).
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
    except (ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, IndexError, KeyError, EOFError,
            struct.error) as error:
        raise ValueError(f"{path}: not a file of tensors, or a damaged one: {error}") from None


def _check_end(path: str | os.PathLike, directory: int, size: int) -> None:
    """The archive ends as torch writes it, so that torch finds the same directory in it as Python does."""
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
    """Follow the pickle without building anything: on the stack lie the names of functions and of types instead."""
    below: list[list[str]] = []  # what lay on the stack at each mark that is still open
    stack: list[str] = []
    memo: dict[int, str] = {}
    for count, (step, argument, _) in enumerate(pickletools.genops(data)):
        if count > MOST_STEPS:
            raise ValueError(f"a pickle of more than {MOST_STEPS:,} steps")
        name, (taken, marked, given) = step.name, STEPS[step.name]
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
            del stack[len(stack) - taken:]
            stack += [argument if name == "GLOBAL" else "EMPTY_TUPLE" if name == "EMPTY_TUPLE" else kind
                      for kind in given]
