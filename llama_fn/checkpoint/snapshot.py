"""Snapshots: any tree of tensors, such as the state of a training run, in one file with a checksum for each leaf."""

import os
import zlib
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint.atomic import replacing
from llama_fn.checkpoint.files import read_tensors, write_tensors
from llama_fn.checkpoint.weights import spelled, stored

T = TypeVar("T")


def save_snapshot(value: Any, path: str | os.PathLike) -> None:
    """Write a tree of tensors to a file, each leaf under its path in the tree.

    The write is atomic: until it is complete, the file that was there before stays. Raises `OSError` with the file's
    name and a remedy.

    Example: ``save_snapshot(state, "run/snapshot.pt")``.
    """
    leaves = {name: x.detach().cpu() for name, x in tree.paths(value).items()}
    checksums = {name: _checksum(x) for name, x in leaves.items()}
    with replacing(path) as beside:
        write_tensors({"leaves": leaves, "checksums": checksums}, beside)


def load_snapshot(like: T, path: str | os.PathLike) -> T:
    """Read the tree that `save_snapshot` wrote, bit for bit.

    ``like`` is a tree of the same structure, shapes and dtypes; each leaf is put on the device of its counterpart
    there. Raises `FileNotFoundError` for a missing file. Raises `ValueError` that names every leaf that does not fit,
    for the state of another model or optimizer and for a damaged file. The checksums find a single flipped bit, which
    ``torch.load`` does not notice.

    Example: ``state = load_snapshot(init_state(params, optimizer), "run/snapshot.pt")``.
    """
    file = read_tensors(path)
    leaves, checksums = file.get("leaves"), file.get("checksums")
    if not isinstance(leaves, dict) or not isinstance(checksums, dict):
        raise ValueError(f"{path}: not a snapshot of a training run")
    wanted = tree.paths(like)
    wrong = [f"missing: {name}" for name in wanted if name not in leaves]
    wrong += [f"unknown: {name}" for name in leaves if name not in wanted]
    wrong += [f"{name}: should be {_kind(wanted[name])}, is {_kind(x)}" for name, x in leaves.items()
              if name in wanted and _kind(x) != _kind(wanted[name])]
    wrong += [f"{name}: damaged, its checksum differs" for name, x in leaves.items()
              if name in wanted and _kind(x) == _kind(wanted[name]) and checksums.get(name) != _checksum(x)]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} leaves do not fit this run:\n  " + "\n  ".join(wrong))
    return tree.map_with_path(lambda name, x: leaves[name].clone().to(x.device), like)


def _kind(x: Tensor) -> str:
    entry = stored("", "", x)
    return f"{spelled(entry.kind)}{list(entry.shape)}" if isinstance(entry.kind, torch.dtype) else entry.kind


def _checksum(x: Tensor) -> int:
    return zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy().data)
