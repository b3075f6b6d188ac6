"""Files that are whole or not there, whatever fails.

Everything is written by `replacing` (one file) or `replacing_folder` (several files that belong together).

One file is written under a hidden name beside its place. It is synced to the disk, and then renamed to its place.

Several files are written to a hidden folder and all synced. What happens then depends on the place:

- There is no such folder yet: the hidden folder is renamed to it.
- The folder exists. (1) The hidden folder, which lies within it, is renamed to `.complete`: from now on the new files
  count, and until now the old ones did. (2) The old files are removed; only when all are gone do the new ones appear in
  their places, as links to those in `.complete`. (3) `.complete` is renamed and removed.

`load` looks into `.complete` first (see `current`). So a program that is killed, or a power cut, at any moment leaves
all old files or all new ones, and never some of each. Not even a program that knows nothing of `.complete` sees both.
The next save to the folder finishes steps 2 and 3. Each step is synced before the next begins.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

COMPLETE = ".complete"
ROOM, PLACE = "make room there, or choose another disk", "choose another place, or change its permissions"
REMEDIES = {errno.ENOSPC: ROOM, errno.EDQUOT: ROOM, errno.EFBIG: "choose another disk, or a larger `ulimit -f`",
            errno.EACCES: PLACE, errno.EPERM: PLACE, errno.EROFS: "choose another place",
            errno.ENAMETOOLONG: "choose a shorter name", errno.EISDIR: "choose another name, or move that folder",
            **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "choose another folder, or move that file"),
            errno.ENOENT: "choose another place"}


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` at the end, and is removed if anything fails.

    Raises `OSError` that names the file, what went wrong while it was written, and the remedy.
    """
    path = Path(path)
    with writing(path), _made(path.parent):
        if path.is_dir():
            raise OSError(errno.EISDIR, "", str(path))
        beside = _beside(path)
        try:
            with writing(path, beside):
                yield beside
                sync(beside)
                beside.replace(path)
                sync(path.parent)
        finally:
            _remove(beside)


@contextmanager
def replacing_folder(folder: str | os.PathLike, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write to, whose files move to `folder` at the end, all or none: the steps are told above.

    It lies within `folder` if that is there: a file moves only within its disk, and `folder` may be the top of one.
    Files in `folder` that match a pattern of `instead_of` and are not written anew are removed; all others stay.
    Raises `OSError` as `replacing` does.
    """
    folder = Path(folder).resolve()
    with writing(folder), _made(folder.parent):
        there = folder.exists()
        if there and not folder.is_dir():
            raise OSError(errno.ENOTDIR, "", str(folder))
        if there:
            _finish(folder, instead_of)
        beside = _beside(folder / "save" if there else folder)
        try:
            with writing(folder, beside):
                beside.mkdir()
                yield beside
                names = sorted(file.name for file in beside.iterdir())
                for place in (*(beside / name for name in names), beside):
                    sync(place)
                if in_the_way := [place for name in names if (place := folder / name).is_dir()]:
                    raise OSError(errno.EISDIR, "", str(in_the_way[0]))
                beside.rename(folder / COMPLETE if there else folder)
                sync(folder if there else folder.parent)
                if there:
                    _finish(folder, instead_of)
        finally:
            _remove(beside)


@contextmanager
def writing(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Say of an `OSError` which file was written, what went wrong, and what to do. One of another file stays as it is.

    `beside` is the hidden place where `path` is written first.
    """
    try:
        yield
    except OSError as error:
        named = path if error.filename is None else Path(str(error.filename))
        if beside is not None and beside in (named, *named.parents):
            named = path / named.relative_to(beside)
        if error.errno is None or not (path in (named, *named.parents) or named in path.parents):
            raise
        remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
        raise OSError(error.errno, f"{os.strerror(error.errno)}, while writing{remedy}", str(named)) from error


@contextmanager
def appending(path: Path, begin: str) -> Iterator[Callable[[str], None]]:
    """A function that appends a text to a file, which is to `begin` so. A text is there at once, but not synced."""
    with replacing(path) as beside:
        beside.write_text(begin)
    with path.open("ab", buffering=0) as file:  # without a buffer nothing is left that closing could fail to write

        def append(text: str) -> None:
            data = text.encode()
            with writing(path):
                while data:
                    data = data[file.write(data):]

        yield append


def current(folder: str | os.PathLike) -> Path:
    """Where to read what `replacing_folder` wrote to a folder: there, or in `.complete` if the end was interrupted."""
    complete = Path(folder) / COMPLETE
    return complete if complete.is_dir() and not complete.is_symlink() else Path(folder)  # we never wrote a link


def _finish(folder: Path, instead_of: Sequence[str]) -> None:
    """Steps 2 and 3. They may have been begun before: all is done again."""
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
        except OSError:  # this file system has no links
            shutil.copy(complete / name, folder / name)
            sync(folder / name)
    sync(folder)
    done = _beside(folder / "save")
    complete.rename(done)
    sync(folder)  # or `.complete` could be back after a power cut, without its files
    _remove(done)


def _beside(path: Path) -> Path:
    """A new hidden name beside a path, of its own for every writer. What killed writers left there is removed."""
    start = "." + path.name.encode()[:200].decode(errors="ignore") + "."  # a name has at most 255 bytes
    ours = re.compile(re.escape(start) + r"[0-9a-f]{8}\.part")  # that of `name.x`, written right now, begins alike
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
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it. What was made is removed again if anything fails."""
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
    """Wait until a file, or a folder's list of files, is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder, and one may write to a folder without being able to read it
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some file systems sync no folder
            raise
    finally:
        os.close(handle)
