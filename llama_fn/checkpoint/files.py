"""Files that are whole or not there: written beside their place, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` at the end, and is removed if anything fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> dict:
    """Raises `FileNotFoundError`, or `ValueError` naming the file if it holds anything but a JSON object."""
    try:
        value = json.loads(Path(path).read_text())
    except ValueError as error:  # bad UTF-8 is one, too
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_tensors(path: str | os.PathLike) -> dict[str, Any]:
    """The dictionary of a torch file, mapped into memory. Pickled code in it is refused, never run (`weights_only`).

    Raises `FileNotFoundError`, or `ValueError` naming the file if it is truncated, corrupt, or holds anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ValueError, ... for bad files
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a file of tensors, or a damaged one: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, found a {type(state).__name__}")
    return state
