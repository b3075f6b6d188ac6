"""Snapshots of earlier versions: one file of `torch.save`, with a CRC-32 of each leaf. They are read, not written."""

import os
import zlib
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint.files import read_tensors
from llama_fn.checkpoint.weights import spelled, stored

T = TypeVar("T")


def load_snapshot_pt(like: T, path: str | os.PathLike) -> T:
    """Read the tree in a snapshot of an earlier version, bit for bit.

    ``like`` and the errors are those of `load_snapshot`. No code in the file is run.

    Example: ``state = load_snapshot_pt(init_state(params, optimizer), "run/snapshot.pt")``.
    """
    file = read_tensors(path)
    leaves, checksums = file.get("leaves"), file.get("checksums")
    if not isinstance(leaves, dict) or not isinstance(checksums, dict):
        raise ValueError(f"{path}: not a snapshot of a training run")
    wanted: dict[str, Any] = tree.paths(like)
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
