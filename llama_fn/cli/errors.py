"""An error as one line that a user can act on."""

import errno
from collections.abc import Iterable

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # what torch's allocators say


def is_for_the_user(error: Exception) -> bool:
    """Whether the input, the files or the machine caused the error. Any other error is a mistake in this program."""
    return isinstance(error, ValueError | OSError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


def description(error: Exception) -> str:
    """What is wrong, and with which file.

    Functions that write a file name it in their errors. So an error of a full disk that names no file is about standard
    output.
    """
    if isinstance(error, MemoryError | RuntimeError):
        return one_line(["there is not enough memory for this", *str(error).splitlines()[:1]])
    if not isinstance(error, OSError) or not error.strerror:
        return one_line(str(error).splitlines())
    place = error.filename
    if place is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        place = "standard output"
    return error.strerror if place is None else f"{place}: {error.strerror}"


def one_line(lines: Iterable[str]) -> str:
    """The lines that are not blank, joined by semicolons."""
    return "; ".join(line.strip() for line in lines if line.strip()).replace(":; ", ": ").replace(".; ", "; ")
