"""The state of a training run in one file: any tree of tensors, with a checksum a leaf."""

import os
import zlib
from typing import TypeVar

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint.atomic import replacing
from llama_fn.checkpoint.files import read_tensors, write_tensors
from llama_fn.checkpoint.weights import spelled, stored

T = TypeVar("T")


def save_snapshot(value: T, path: str | os.PathLike) -> None:
    """Write a tree's leaves by their paths. The file is whole or not there: the one before stays until it is."""
    leaves = {name: x.detach().cpu() for name, x in tree.paths(value).items()}
    checksums = {name: _checksum(x) for name, x in leaves.items()}
    with replacing(path) as beside:
        write_tensors({"leaves": leaves, "checksums": checksums}, beside)


def load_snapshot(like: T, path: str | os.PathLike) -> T:
    """A tree as it was saved, bit for bit; `like` is a tree of the same structure, shapes and dtypes.

    Raises `FileNotFoundError`, and `ValueError` for a damaged file (a flipped bit too, which torch itself does not
    see) or for the state of another model or optimizer, naming every leaf that does not fit.
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
    return zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy())
