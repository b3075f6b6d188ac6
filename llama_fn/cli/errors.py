"""An error as one line for people."""

import errno
from collections.abc import Iterable

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # of torch's allocators


def is_for_people(error: Exception) -> bool:
    """Whether it comes of the input, the files or the machine. Any other is a mistake in this program."""
    return isinstance(error, ValueError | OSError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


def told(error: Exception) -> str:
    """What is wrong with which file. Writers of files name them: what could not be written without a name is output."""
    if isinstance(error, MemoryError | RuntimeError):
        return one_line(["there is not enough memory for this", *str(error).splitlines()[:1]])
    if not getattr(error, "strerror", None):
        return one_line(str(error).splitlines())
    place = error.filename
    if place is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        place = "standard output"
    return error.strerror if place is None else f"{place}: {error.strerror}"


def one_line(lines: Iterable[str]) -> str:
    """The lines as one."""
    return "; ".join(line.strip() for line in lines if line.strip()).replace(":; ", ": ").replace(".; ", "; ")
