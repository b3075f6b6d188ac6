"""Snapshots: any tree of tensors, such as the state of a training run, in a folder with a digest of every leaf.

The folder holds two files:

- ``state.safetensors``: the leaves, each under its path in the tree.
- ``manifest.json``: the dtype, shape and SHA-256 of every leaf, whatever else the writer says about the snapshot, and
  a digest of the manifest itself.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint.atomic import current, replacing_folder, write_bytes
from llama_fn.checkpoint.files import read_json, write_json
from llama_fn.checkpoint.limits import check_header
from llama_fn.checkpoint.sealed import sealed, unsealed
from llama_fn.checkpoint.write_errors import explaining_errors

T = TypeVar("T")

STATE, MANIFEST = "state.safetensors", "manifest.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # by their names in safetensors
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PART = 2**24  # bytes of a write; between two of them a save can be given up


def save_snapshot(value: Any, folder: str | os.PathLike, about: Mapping[str, Any] = MappingProxyType({}),
                  before_write: Callable[[], None] = lambda: None) -> None:
    """Write a tree of tensors to a folder, with ``about`` (anything that JSON can hold) in the manifest.

    The write is atomic: until it is complete, what was there before stays. ``before_write`` is called before every
    write; an error that it raises ends the save and leaves nothing behind. Raises `OSError` with the file's name and a
    remedy. Raises `ValueError` for a leaf of a dtype that safetensors or this function does not know.

    Example: ``save_snapshot(state, "run/snapshots/step-00001000")``.
    """
    leaves = {name: x.detach().cpu().contiguous() for name, x in tree.paths(value).items()}
    if unknown := [name for name, x in leaves.items() if x.dtype not in NAMES]:
        raise ValueError(f"{unknown[0]}: a snapshot cannot hold {leaves[unknown[0]].dtype}")
    with replacing_folder(folder, (STATE, MANIFEST)) as beside:
        digests = _write_leaves(leaves, beside / STATE, before_write)
        kinds = {name: {**_kind(x), "sha256": digests[name]} for name, x in leaves.items()}
        before_write()
        write_json(beside / MANIFEST, sealed({"leaves": kinds, "about": dict(about)}))


def read_about(folder: str | os.PathLike) -> dict[str, Any]:
    """What `save_snapshot` was given as ``about``. Raises the errors of `load_snapshot` that concern the manifest."""
    return _read_manifest(current(folder))["about"]


def load_snapshot(like: T, folder: str | os.PathLike) -> T:
    """Read the tree that `save_snapshot` wrote, bit for bit.

    ``like`` is a tree of the same structure, shapes and dtypes; each leaf is put on the device of its counterpart
    there. Raises `FileNotFoundError` for a missing file. Raises `ValueError` that names every leaf that does not fit,
    for the state of another model or optimizer and for a damaged file. The digests find a single flipped bit.

    Example: ``state = load_snapshot(init_state(params, optimizer), "run/snapshots/step-00001000")``.
    """
    folder = current(folder)
    known, wanted = _read_manifest(folder)["leaves"], tree.paths(like)
    wrong = [f"missing: {name}" for name in wanted if name not in known]
    wrong += [f"unknown: {name}" for name in known if name not in wanted]
    wrong += [f"{name}: should be {_spelled(_kind(wanted[name]))}, is {_spelled(kind)}" for name, kind in known.items()
              if name in wanted and _spelled(kind) != _spelled(_kind(wanted[name]))]
    found = {} if wrong else _read_leaves(folder / STATE, known)
    wrong += [f"{name}: damaged, its digest differs" for name, x in found.items()
              if _digest(x) != known[name].get("sha256")]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} leaves do not fit this run:\n  " + "\n  ".join(wrong))
    return tree.map_with_path(lambda name, x: found[name].to(x.device), like)


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    manifest = unsealed(read_json(file), file)
    if not (isinstance(manifest.get("leaves"), dict) and isinstance(manifest.get("about"), dict)):
        raise ValueError(f"{file}: not the manifest of a snapshot")
    return manifest


def _write_leaves(leaves: dict[str, Tensor], file: Path, before_write: Callable[[], None]) -> dict[str, str]:
    """Write a safetensors file, and return the digest of each leaf.

    safetensors' own writer takes the whole file at once; here a save can be given up between two writes, and a leaf is
    read once for both its digest and the file.
    """
    # Leaves of wide dtypes come first: a leaf must start at a multiple of the bytes of its numbers.
    order = sorted(leaves, key=lambda name: (-leaves[name].element_size(), name))
    header, end, digests = {}, 0, {}
    for name in order:
        begin, end = end, end + leaves[name].nbytes
        header[name] = {**_kind(leaves[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with explaining_errors(file), file.open("wb", buffering=0) as data:
        write_bytes(data.fileno(), len(text).to_bytes(8, "little") + text)
        for name in order:
            numbers, digest = _bytes(leaves[name]), hashlib.sha256()
            for start in range(0, len(numbers), PART):
                before_write()
                digest.update(numbers[start:start + PART])
                write_bytes(data.fileno(), numbers[start:start + PART])
            digests[name] = digest.hexdigest()
    return digests


def _read_leaves(file: Path, known: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, copied into memory. Raises `ValueError` unless they are those of the manifest."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    check_header(file)
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118, it is not a dict
            kinds = {name: {"dtype": str(x.get_dtype()), "shape": list(x.get_shape())} for name, x in parts.items()}
            if kinds != {name: {"dtype": kind["dtype"], "shape": kind["shape"]} for name, kind in known.items()}:
                raise ValueError(f"{file}: damaged: it does not hold the leaves of its manifest")
            return {name: tensors.get_tensor(name).clone() for name in kinds}
    except PermissionError:  # this says nothing about the file
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file, or a damaged one: {error}") from None


def _kind(x: Tensor) -> dict[str, Any]:
    return {"dtype": NAMES.get(x.dtype, str(x.dtype)), "shape": list(x.shape)}


def _spelled(kind: Any) -> str:
    """"float32[5, 3]" for the dtype and shape of a leaf."""
    if not isinstance(kind, dict):
        return "nothing that a snapshot holds"
    name = str(kind.get("dtype"))
    return f"{DTYPES.get(name, name)}{kind.get('shape')}".removeprefix("torch.")


def _bytes(x: Tensor) -> memoryview:
    return x.contiguous().flatten().view(torch.uint8).numpy().data


def _digest(x: Tensor) -> str:
    return hashlib.sha256(_bytes(x)).hexdigest()
