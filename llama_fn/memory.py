"""The process's memory: how much it takes, and whether it keeps what was freed."""

import ctypes
import os
import sys
from pathlib import Path

# The numbers of two parameters of glibc's `mallopt` (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_memory() -> bool:
    """Have this process keep freed memory for its next tensors, from now on.

    The result says whether the C library has such a setting. By default glibc gives the memory of large tensors back to
    the kernel, and takes it again page by page, with zeros written to it: 0.3 ms per MiB, a fifth of the time of a
    training step. With this call, the process stays as large as it has been at its largest. It changes the whole
    process, so a program calls it, and an imported library should not.

    >>> kept = lf.keep_memory()
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def resident_bytes() -> int | None:
    """The memory of this process that lies in RAM, in bytes; None where the system is not Linux."""
    if sys.platform != "linux":
        return None
    _, pages, *_ = Path("/proc/self/statm").read_text().split()
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
