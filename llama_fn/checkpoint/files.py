"""Files that are what they say: in their folder, of tensors, without code, no larger than they claim to be."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_fn import text
from llama_fn.checkpoint.atomic import replacing, writing
from llama_fn.checkpoint.limits import check_header, check_size, check_torch_file
from llama_fn.checkpoint.weights import Report, Stored

KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


def write_tensors(value: Any, path: Path, report: Report = lambda count: None) -> None:
    """`torch.save`, with the file's own error if there is one: torch puts one of its own in its place.

    `report` is told of bytes as they are written.
    """
    with writing(path), path.open("wb") as file:
        counted = _Counted(file, report)
        try:
            torch.save(value, counted)
        except Exception as error:
            raise counted.error or error from None


class _Counted:
    """A file that reports the bytes written to it, and keeps its first error."""

    def __init__(self, file: Any, report: Report) -> None:
        self.file, self.report, self.error = file, report, None

    def write(self, data: Any) -> int:
        try:
            count = self.file.write(data)
            self.report(count)
        except BaseException as error:  # Ctrl-C too
            self.error = self.error or error
            raise
        return count

    def flush(self) -> None:
        self.file.flush()


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """safetensors' `save_file`, with the system's error as `OSError`, and a file that others may read, as any other."""
    with writing(path):
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(apart(state), path, {"format": "pt"})
        except SafetensorError as error:
            if code := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(code[1]), "", str(path)) from None
            raise
        path.chmod(mode)  # safetensors lets nobody but the owner read it


def read_json(path: str | os.PathLike, most: int = 2**22) -> dict:
    """Raises `FileNotFoundError`, or `ValueError` naming the file if it holds anything but a JSON object, or is of more
    bytes than `most`.
    """
    check_size(path, most)
    value = text.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_tensors(path: str | os.PathLike) -> dict[str, Any]:
    """The dictionary of a torch file, mapped into memory. Pickled code in it is refused, never run (`weights_only`).

    Raises `FileNotFoundError`, or `ValueError` naming the file if it is truncated, corrupt, or holds anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_torch_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, PermissionError):  # these say nothing of the file
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ValueError, ... for bad files
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a file of tensors, or a damaged one: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, found a {type(state).__name__}")
    return state


def is_torch_file(file: Path) -> bool:
    """Whether a file begins as `torch.save` begins one: as a zip archive, or, before torch 1.6, as a pickle."""
    with file.open("rb") as data:
        return data.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")


def header(file: Path) -> list[Stored]:
    """The tensors of a safetensors file, by its header; the library checks its offsets."""
    check_header(file)
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118, it is no dict
            return [Stored(file.name, name, KINDS.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                    for name, part in parts.items()]
    except PermissionError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file, or a damaged one: {error}") from None


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each in memory of its own; safetensors refuses others."""
    owners = {x.untyped_storage().data_ptr(): name for name, x in state.items()}
    return {name: x if owners[x.untyped_storage().data_ptr()] == name else x.clone() for name, x in state.items()}
