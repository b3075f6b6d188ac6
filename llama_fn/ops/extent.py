"""What the host knows of a cache's lengths on a GPU, so that it need not wait for the GPU to read them."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from llama_fn.modes import concrete, on_gpu, traced, transforms
from llama_fn.ops.inside import min_max
from llama_fn.private import version


class Extent(NamedTuple):
    """The minimum and the maximum of a length's integers; slots are read up to `read_up_to`, which may be more."""

    minimum: int
    maximum: int
    read_up_to: int


class Lengths:
    """What its owner knows of lengths on a GPU, for as long as such a tensor lives and is not written to.

    A write through `.data` is not noticed. An inference tensor does not count its writes, so nothing is kept of it.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, int, int, Extent]] = {}

    def get(self, length: Tensor) -> Extent | None:
        """What is known of the tensor, if it was not written to since."""
        known = self._known.get(id(length))
        if known is None or known[0]() is not length or known[1:3] != (version(length), length.data_ptr()):
            return None
        return known[3]

    def put(self, length: Tensor, known: Extent) -> None:
        """Keep what is known of the tensor."""
        if on_gpu(length) and not transforms() and not length.is_inference():
            place, entries = id(length), self._known
            end = weakref.ref(length, lambda _: entries.pop(place, None))
            entries[place] = end, version(length), length.data_ptr(), known


class _Current(threading.local):
    lengths: Lengths | None = None


_current = _Current()


@contextmanager
def with_lengths(lengths: Lengths) -> Iterator[None]:
    """Within it, this thread looks into `lengths` before it reads a tensor, and stores there what it reads."""
    before, _current.lengths = _current.lengths, lengths
    try:
        yield
    finally:
        _current.lengths = before


def extent(length: Tensor) -> Extent | None:
    """The extent of a tensor's integers, or None where they cannot be read.

    On a GPU the host has to wait for them. Within `with_lengths`, it waits once in a tensor's life.
    """
    lengths = _current.lengths if on_gpu(length) and not traced() else None
    if lengths is not None and (known := lengths.get(length)) is not None:
        return known
    if not concrete(length) or not length.numel():
        return None
    minimum, maximum = min_max(length)
    known = Extent(minimum, maximum, maximum)
    if lengths is not None:
        lengths.put(length, known)
    return known


def grown(length: Tensor, known: Extent | None, count: int) -> Tensor:
    """The sum `length` + `count`. Within `with_lengths`, its extent is known without reading."""
    longer = length + count
    if known is not None and on_gpu(length) and (lengths := _current.lengths) is not None:
        lengths.put(longer, Extent(*(n + count for n in known)))
    return longer
