"""Errors of writing: which file could not be written, why, and what to do about it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAKE_ROOM, CHANGE_PLACE = "make room there, or choose another disk", "choose another place, or change its permissions"
REMEDIES = {errno.ENOSPC: MAKE_ROOM, errno.EDQUOT: MAKE_ROOM,
            errno.EFBIG: "choose another disk, or a larger `ulimit -f`",
            errno.EACCES: CHANGE_PLACE, errno.EPERM: CHANGE_PLACE, errno.EROFS: "choose another place",
            errno.ENAMETOOLONG: "choose a shorter name", errno.EISDIR: "choose another name, or move that folder",
            **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "choose another folder, or move that file"),
            errno.ENOENT: "choose another place"}


@contextmanager
def explaining_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """A context manager that adds the file's name, the reason and a remedy to an `OSError` from its block.

    ``temporary`` is the temporary file or folder that will replace ``path``. An error that names it is reported as an
    error of ``path``. An error that concerns an unrelated file is raised unchanged.
    """
    try:
        yield
    except OSError as error:
        named = path if error.filename is None else Path(str(error.filename))
        if temporary is not None and temporary in (named, *named.parents):
            named = path / named.relative_to(temporary)
        if error.errno is None or not (path in (named, *named.parents) or named in path.parents):
            raise
        remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
        raise OSError(error.errno, f"{os.strerror(error.errno)}, while writing{remedy}", str(named)) from error
