"""What becomes of memory that was freed."""

import ctypes
import sys

# glibc's mallopt (malloc.h): the numbers of its parameters.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_memory() -> bool:
    """Keep what is freed for the next tensor, in this process from now on; False where the C library cannot be told.

    Otherwise glibc gives the memory of large tensors back to the kernel and takes it anew, page by page and zeroed: 0.3
    ms a MiB, a fifth of a training step's time and more of per-sample gradients'. The process stays as large as it was
    at its largest. The program calls it where it trains and measures; a library that is imported should not.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
