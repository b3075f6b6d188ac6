"""What the host knows of a cache's lengths: a GPU would have to be waited for to read them."""

import weakref
from typing import NamedTuple

from torch import Tensor

from llama_fn.modes import concrete, on_gpu, traced, transforms
from llama_fn.ops.inside import ends
from llama_fn.private import version


class Extent(NamedTuple):
    """The least and the most of a length's integers, and the length up to which slots are read, which may be more."""

    least: int
    most: int
    reach: int


_known: dict[int, tuple[weakref.ref, int, int, Extent]] = {}


def extent(length: Tensor) -> Extent | None:
    """The extent of a tensor's integers, or None where they cannot be read.

    On a GPU they are read once in the tensor's life, since the host has to wait for them, and the result of `grown` is
    known without reading. A write through `.data` is not noticed.
    """
    if on_gpu(length) and not traced() and (known := remembered(length)) is not None:
        return known
    if not concrete(length) or not length.numel():
        return None
    least, most = ends(length)
    known = Extent(least, most, most)
    return noted(length, known) if on_gpu(length) else known


def remembered(length: Tensor) -> Extent | None:
    """What was noted of a tensor on a GPU, if it was not written to since."""
    known = _known.get(id(length))
    if known is None or known[0]() is not length or known[1:3] != (version(length), length.data_ptr()):
        return None
    return known[3]


def noted(length: Tensor, known: Extent) -> Extent:
    """Remember what is known of a tensor on a GPU; not of an inference tensor, which does not count its writes."""
    if on_gpu(length) and not transforms() and not length.is_inference():
        place = id(length)
        end = weakref.ref(length, lambda _: _known.pop(place, None))
        _known[place] = end, version(length), length.data_ptr(), known
    return known


def grown(length: Tensor, count: int) -> Tensor:
    """The sum `length` + `count`."""
    longer = length + count
    if on_gpu(length) and (known := extent(length)) is not None:
        noted(longer, Extent(*(n + count for n in known)))
    return longer
