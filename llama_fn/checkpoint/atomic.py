"""Atomic writes: after any failure, a reader finds all of the old files or all of the new ones.

Use `replacing` to write one file, and `replacing_folder` to write several files that belong together.

`replacing` writes to a hidden file in the same folder. It syncs that file to the disk and then renames it to its final
name.

`replacing_folder` writes to a hidden folder and syncs every file in it. What it does next depends on the destination:

- If the destination does not exist, the hidden folder is renamed to it.
- If the destination exists, the hidden folder lies inside it, and three steps follow.
  (1) The hidden folder is renamed to ``.complete``. From this moment on, readers use the new files.
  (2) The old files are removed. When all of them are gone, the new files are linked from ``.complete`` to their final
  names.
  (3) ``.complete`` is renamed to a hidden name and removed.

Each step is synced to the disk before the next one begins. Readers ask `current` where the files are, and it prefers
``.complete``. Therefore a power cut or a killed program leaves all old files or all new ones, never a mixture. A
program that does not know ``.complete`` never sees a mixture either, because no new file appears before every old one
is gone. If a save was interrupted after step 1, the next save to that folder finishes steps 2 and 3.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_fn.checkpoint.write_errors import explaining_errors

COMPLETE = ".complete"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A context manager that yields a temporary file, which replaces ``path`` when the block ends.

    If the block raises, the temporary file is removed and ``path`` stays as it was. Folders that were created for the
    file are removed too. Raises `OSError` with the file's name, the reason and a remedy.
    """
    path = Path(path)
    with explaining_errors(path), _with_parents(path.parent):
        if path.is_dir():
            raise OSError(errno.EISDIR, "", str(path))
        temporary = _temporary_name(path)
        try:
            with explaining_errors(path, temporary):
                yield temporary
                sync(temporary)
                temporary.replace(path)
                sync(path.parent)
        finally:
            _remove(temporary)


@contextmanager
def replacing_folder(folder: str | os.PathLike, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """A context manager that yields a temporary folder, whose files move to ``folder`` when the block ends.

    All files move or none does; the steps are described at the top of this file. Old files in ``folder`` whose names
    match a pattern in ``instead_of`` are removed, and every other file stays. If ``folder`` exists, the temporary
    folder lies inside it: a rename works only within one disk, and ``folder`` may be the mount point of a disk. Raises
    `OSError` with the file's name, the reason and a remedy.
    """
    folder = Path(folder).resolve()
    with explaining_errors(folder), _with_parents(folder.parent):
        exists = folder.exists()
        if exists and not folder.is_dir():
            raise OSError(errno.ENOTDIR, "", str(folder))
        if exists:
            _finish(folder, instead_of)
        temporary = _temporary_name(folder / "save" if exists else folder)
        try:
            with explaining_errors(folder, temporary):
                temporary.mkdir()
                yield temporary
                names = sorted(file.name for file in temporary.iterdir())
                for place in (*(temporary / name for name in names), temporary):
                    sync(place)
                if folders_in_the_way := [place for name in names if (place := folder / name).is_dir()]:
                    raise OSError(errno.EISDIR, "", str(folders_in_the_way[0]))
                temporary.rename(folder / COMPLETE if exists else folder)
                sync(folder if exists else folder.parent)
                if exists:
                    _finish(folder, instead_of)
        finally:
            _remove(temporary)


def write_bytes(handle: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` to an open file. The operating system may take only a part of it at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest):]


def remove_folder(folder: Path) -> None:
    """Remove a folder that only one process writes to. A reader sees all of its files or none of them."""
    temporary = _temporary_name(folder)
    folder.rename(temporary)
    _remove(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed writers left in a folder. No writer may be at work in it."""
    for left in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\..*\.[0-9a-f]{8}\.part", left.name):
            _remove(left)


def current(folder: str | os.PathLike) -> Path:
    """The folder that holds the newest complete files that `replacing_folder` wrote to ``folder``.

    This is ``folder`` itself, or ``folder/.complete`` if the last save was interrupted after its first step.
    """
    complete = Path(folder) / COMPLETE
    ours = complete.is_dir() and not complete.is_symlink()  # a link was made by someone else
    return complete if ours else Path(folder)


def _finish(folder: Path, instead_of: Sequence[str]) -> None:
    """Do steps 2 and 3 of a save. It is safe to repeat them after an interruption."""
    complete = folder / COMPLETE
    if current(folder) != complete:
        return
    names = sorted(file.name for file in complete.iterdir())
    for old in {*(folder / name for name in names), *(old for pattern in instead_of for old in folder.glob(pattern))}:
        old.unlink(missing_ok=True)
    sync(folder)
    for name in names:
        try:
            os.link(complete / name, folder / name)
        except OSError:  # this file system does not support hard links
            shutil.copy(complete / name, folder / name)
            sync(folder / name)
    sync(folder)
    done = _temporary_name(folder / "save")
    complete.rename(done)
    sync(folder)  # otherwise a power cut could bring `.complete` back without its files
    _remove(done)


def _temporary_name(path: Path) -> Path:
    """A hidden name in the same folder as ``path``, with a random part, so that every writer has its own.

    Temporary files that earlier writers of ``path`` left behind when they were killed are removed.
    """
    start = "." + path.name.encode()[:200].decode(errors="ignore") + "."  # a name has at most 255 bytes
    # The whole name must match: one that only begins alike may belong to another file that is being written.
    ours = re.compile(re.escape(start) + r"[0-9a-f]{8}\.part")
    for left in [left for left in path.parent.iterdir() if ours.fullmatch(left.name)]:
        _remove(left)
    return path.with_name(f"{start}{secrets.token_hex(4)}.part")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def _with_parents(folder: Path) -> Iterator[None]:
    """Create a folder and its parents. If the block raises, remove the ones that were created."""
    made: list[Path] = []
    try:
        for place in reversed([folder, *folder.parents]):
            if not place.is_dir():
                place.mkdir()
                made.append(place)
                sync(place.parent)
        yield
    except BaseException:
        for place in reversed(made):
            with suppress(OSError):
                place.rmdir()
        raise


def sync(path: Path) -> None:
    """Wait until the disk holds a file's contents, or a folder's list of files."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open a folder; elsewhere a folder may be writable but not readable
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot sync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)
