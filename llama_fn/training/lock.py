"""A lock on a run's folder, so that two processes never train in it at the same time."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has another way to lock files
    fcntl = None

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context manager that holds the lock of a run's folder. It makes the folder if there is none.

    The operating system drops the lock when its process ends, also when it is killed. At the end the file ``lock`` is
    removed, and so are folders that were made for it and are still empty. Raises `ValueError` if another process (or
    another thread of this one) holds the lock. A file system without locks gets a warning.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        handle = _open_locked(folder / LOCK, folder)
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()
            os.close(handle)
    finally:
        for place in made:
            with suppress(OSError):  # it holds files now
                place.rmdir()


def _open_locked(file: Path, folder: Path) -> int:
    """An open handle of the file, with the lock. The process that holds it is written in the file."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, file, folder)
            if _is_still(handle, file):
                os.ftruncate(handle, 0)
                with suppress(OSError):  # the number is only there for messages, and the disk may be full
                    os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner has removed it between our two calls


def _lock(handle: int, file: Path, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            warnings.warn(f"{file}: this file system has no locks ({error.strerror}): take care that no other process "
                          "trains in this folder", stacklevel=5)
            return
        owner = os.pread(handle, 20, 0).decode(errors="replace").strip()
        raise ValueError(f"{folder}: another process{f' ({owner})' if owner else ''} trains in this folder; wait until "
                         "it ends, or choose another folder") from None


def _is_still(handle: int, file: Path) -> bool:
    """Whether the file under this name is the open one."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False
