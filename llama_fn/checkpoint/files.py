"""Files that are whole or not there, and files that are what they say: in their folder, of tensors, without code."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_fn.checkpoint.weights import Stored

KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


@contextmanager
def replacing_folder(folder: str | os.PathLike, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write to, whose files move to `folder` at the end; if anything fails before, none does.

    It lies within `folder` if that is there: a file moves only within its disk, and `folder` may be the top of one.
    Files in `folder` that match a pattern of `instead_of` and are not written anew are removed; all others stay.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder / ".part" if folder.is_dir() else folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if not folder.exists():
            beside.rename(folder)
            return
        new = {file.name for file in beside.iterdir()}
        old = {file for pattern in instead_of for file in folder.glob(pattern) if file.name not in new}
        if in_the_way := [file for name in sorted(new) if (file := folder / name).is_dir()]:
            raise IsADirectoryError(f"{in_the_way[0]}: a folder, in the place of a file to be written")
        for name in sorted(new):
            (beside / name).replace(folder / name)
        for file in old:
            file.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def inside(folder: str | os.PathLike, name: str, *also: Path) -> Path:
    """The file `name` of a folder. It must lie there, by its name and by where a link leads, or in a folder of `also`.

    Hugging Face's cache is let through: its snapshots are links to the folder of blobs beside them. Raises
    `FileNotFoundError`, and `ValueError` for a file that is elsewhere.
    """
    folder = Path(folder)
    if Path(name).name != name:
        raise ValueError(f"{folder}: {name!r} is not the name of a file in this folder; only such names are followed")
    file, home = folder / name, folder.resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    homes = [home, *(place.resolve() for place in also)]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if (real := file.resolve()).parent not in homes:
        raise ValueError(f"{file}: a link to {real}, outside the folder; copy that file here, if you trust it")
    return file


def write_json(path: str | os.PathLike, value: Any) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> dict:
    """Raises `FileNotFoundError`, or `ValueError` naming the file if it holds anything but a JSON object."""
    try:
        value = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
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


def header(file: Path) -> list[Stored]:
    """The tensors of a safetensors file, by its header; the library checks its length and offsets."""
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118, it is no dict
            return [Stored(file.name, name, KINDS.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                    for name, part in parts.items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file, or a damaged one: {error}") from None


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each in memory of its own; safetensors refuses others."""
    owners = {x.untyped_storage().data_ptr(): name for name, x in state.items()}
    return {name: x if owners[x.untyped_storage().data_ptr()] == name else x.clone() for name, x in state.items()}
