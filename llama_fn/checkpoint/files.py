"""Reading and writing single files of JSON and of tensors.

Readers check that a file lies in its own folder, that it is no larger than it may be, and that it holds no code.
Nothing in a file is ever executed.
"""

import json
import os
import re
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_fn import text
from llama_fn.checkpoint.atomic import replacing
from llama_fn.checkpoint.limits import check_header, check_size, check_torch_file
from llama_fn.checkpoint.weights import ReportBytes, Stored, stored
from llama_fn.checkpoint.write_errors import explaining_errors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def inside(folder: str | os.PathLike, name: str, *also: Path) -> Path:
    """The path of the file ``name`` in ``folder``, which must not lead out of it.

    ``name`` must be a plain name without folders. A symbolic link must lead to a file in ``folder`` or in one of the
    folders ``also``. Hugging Face's cache is an exception: a snapshot there is a folder of links to the folder
    ``blobs``. Raises `FileNotFoundError` for a missing file, and `ValueError` for a name or a link that leads
    elsewhere.
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
    """Write a value as indented JSON, atomically (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_tensors(value: Any, path: Path, report: ReportBytes = lambda count: None) -> None:
    """Write a value with `torch.save`, and raise the operating system's own error if a write fails.

    `torch.save` alone would raise a RuntimeError that hides the reason. ``report`` is called with the number of bytes
    of each write.
    """
    with explaining_errors(path), path.open("wb") as file:
        counted = _Counted(file, report)
        try:
            torch.save(value, cast(IO[bytes], counted))  # torch calls only its write and flush
        except Exception as error:
            raise counted.error or error from None


class _Counted:
    """An open file that reports the number of bytes of each write, and remembers its first error."""

    def __init__(self, file: Any, report: ReportBytes) -> None:
        self.file, self.report = file, report
        self.error: BaseException | None = None

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
    """Write a safetensors file with the usual permissions. A failed write raises `OSError`, not safetensors' error."""
    with explaining_errors(path):
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(unshared(state), path, {"format": "pt"})
        except SafetensorError as error:
            if code := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(code[1]), "", str(path)) from None
            raise
        path.chmod(mode)  # safetensors would let nobody but the owner read the file


def read_json(path: str | os.PathLike, most: int = 2**22) -> dict:
    """The JSON object in a file.

    Raises `FileNotFoundError` for a missing file. Raises `ValueError` that names the file if it is larger than
    ``most`` bytes or holds anything but a JSON object.
    """
    check_size(path, most)
    value = text.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_tensors(path: str | os.PathLike) -> dict[str, Any]:
    """The dictionary in a file of `torch.save`, mapped into memory.

    Pickled code is refused and never run (``weights_only=True``). Raises `FileNotFoundError` for a missing file.
    Raises `ValueError` that names the file if it is truncated or corrupt, or holds anything but a dictionary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_torch_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, PermissionError):  # these say nothing about the file
        raise
    except Exception as error:  # for a bad file torch raises RuntimeError, UnpicklingError, EOFError, ValueError, ...
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a file of tensors, or a damaged one: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, found a {type(state).__name__}")
    return state


def is_torch_file(file: Path) -> bool:
    """Whether a file begins as `torch.save` begins one: as a zip archive, or, before torch 1.6, as a pickle."""
    with file.open("rb") as data:
        return data.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")


def safetensors_entries(file: Path) -> list[Stored]:
    """The names, dtypes and shapes of a safetensors file, from its header. The library checks the offsets in it."""
    check_header(file)
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118, it is not a dict
            kinds = {name: str(part.get_dtype()) for name, part in parts.items()}
            return [Stored(file.name, name, DTYPES.get(kinds[name], kinds[name]), tuple(part.get_shape()))
                    for name, part in parts.items()]
    except PermissionError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file, or a damaged one: {error}") from None


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copied where two share memory. safetensors refuses to write shared memory."""
    owners = {x.untyped_storage().data_ptr(): name for name, x in state.items()}
    return {name: x if owners[x.untyped_storage().data_ptr()] == name else x.clone() for name, x in state.items()}


def torch_entries(file: Path) -> list[Stored]:
    """The names, dtypes and shapes of a file of `torch.save`."""
    return [stored(file.name, name, x) for name, x in read_tensors(file).items()]
