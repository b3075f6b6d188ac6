"""One file of a snapshot: tensors in safetensors' format, written piece by piece, with a digest of each.

The header has the place of each part in its whole leaf, too, in the words of ``torch.distributed.checkpoint``, whose
``HuggingFaceStorageReader`` therefore reads the files of any number of processes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_fn.checkpoint.atomic import write_bytes
from llama_fn.checkpoint.limits import check_header
from llama_fn.checkpoint.parts import Part
from llama_fn.checkpoint.write_errors import explaining_errors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # by their names in safetensors
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**24  # bytes of a write; between two of them a save can be given up


def write_parts(tensors: Mapping[str, Tensor], parts: Mapping[str, Part], file: Path,
                before_write: Callable[[], None]) -> dict[str, str]:
    """Write a safetensors file, and return the digest of each tensor.

    safetensors' own writer takes the whole file at once; here a save can be given up between two writes, and a tensor
    is read once for both its digest and the file.
    """
    # Tensors of wide dtypes come first: a tensor must start at a multiple of the bytes of its numbers.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end, digests = 0, {}
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {**kind_of(tensors[name]), "data_offsets": [begin, end]}
    if any(any(part.start) for part in parts.values()):
        places = {name: {"saved_offsets": part.start} for name, part in parts.items()}
        header["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with explaining_errors(file), file.open("wb", buffering=0) as data:
        write_bytes(data.fileno(), len(text).to_bytes(8, "little") + text)
        for name in order:
            numbers, digest = _bytes(tensors[name]), hashlib.sha256()
            for start in range(0, len(numbers), PIECE):
                before_write()
                digest.update(numbers[start:start + PIECE])
                write_bytes(data.fileno(), numbers[start:start + PIECE])
            digests[name] = digest.hexdigest()
    return digests


@contextmanager
def opened_parts(file: Path, kinds: Mapping[str, Any]) -> Iterator[Callable[[str], Tensor]]:
    """A context manager that yields a function from a name to its tensor, which is mapped into memory.

    Raises `ValueError` for a damaged file, and unless the dtypes and shapes in it are ``kinds``.
    """
    check_header(file)
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118, it is not a dict
            found = {name: {"dtype": str(x.get_dtype()), "shape": list(x.get_shape())} for name, x in parts.items()}
            if found != kinds:
                raise ValueError(f"{file}: damaged: it does not hold the leaves of its manifest")
            yield tensors.get_tensor
    except PermissionError:  # this says nothing about the file
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file, or a damaged one: {error}") from None


def kind_of(x: Tensor) -> dict[str, Any]:
    """A tensor's dtype and shape, as safetensors and the manifest spell them."""
    return {"dtype": NAMES.get(x.dtype, str(x.dtype)), "shape": list(x.shape)}


def spelled(kind: Any) -> str:
    """"float32[5, 3]" for the dtype and shape of a leaf."""
    if not isinstance(kind, dict):
        return "nothing that a snapshot holds"
    name = str(kind.get("dtype"))
    return f"{DTYPES.get(name, name)}{kind.get('shape')}".removeprefix("torch.")


def digest_of(x: Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(_bytes(x)).hexdigest()


def _bytes(x: Tensor) -> memoryview:
    return x.contiguous().flatten().view(torch.uint8).numpy().data
