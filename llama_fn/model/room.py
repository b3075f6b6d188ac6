"""The room in a cache: how many slots a step reads, and whether new tokens fit."""

from torch import Tensor

from llama_fn.model.cache import Cache
from llama_fn.ops.extent import extent
from llama_fn.ops.inside import check, inside
from llama_fn.ops.slots import Forked, fits, start

PAGE = 64


def reach(cache: Cache, new: int) -> int:
    """How many slots there will be something in after `new` tokens more, up to a multiple of `PAGE`: a step's work
    follows the length and not the room. Where nothing is known of the length, all slots.
    """
    room = cache.k[0].shape[-2]
    if (known := extent(cache.length)) is not None:
        room = min(room, -(-(known.reach + new) // PAGE) * PAGE)
    return room


def ample(max_len: int) -> int:
    """Slots for `max_len` tokens, of which no step reads all: to a compiled one, all slots would be another graph."""
    return -(-max_len // PAGE) * PAGE + 1


def check_room(cache: Cache, new: int, after: Tensor | None = None) -> Cache:
    """The cache. Raises `ValueError` if a row has no room for `new` tokens more, and for a forked cache with an index
    in what its rows share. (`ops/inside.py` tells how it is checked in a graph, and what `after` is.)
    """
    if isinstance(cache.k[0], Forked) and not fits(*(leaf.shape[:-3] for leaf in cache.k[0])):
        shared, own = (list(leaf.shape[:-3]) for leaf in cache.k[0])
        raise ValueError(f"this forked cache has rows of axes {own}, and what they share is of {shared}, which does "
                         "not fit; take some of its rows with lf.select")
    slots, least = cache.k[0].shape[-2], start(cache.k[0])
    if (known := extent(cache.length)) is not None:
        check("length", known.least, known.most, least, slots, new)
        return cache
    return cache._replace(length=inside(cache.length, "length", least, slots, new, after))
