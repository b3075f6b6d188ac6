"""The room in a cache: how many slots a step reads, and whether new tokens fit."""

from torch import Tensor

from llama_fn.ops.extent import Extent
from llama_fn.ops.inside import check, inside
from llama_fn.ops.slots import Forked, fits, start

PAGE = 64


def slots_to_read(leaf: Tensor | Forked, known: Extent | None, new: int) -> int:
    """How many slots of a layer's keys a step reads: up to the end of the longest row after `new` more tokens.

    The number is rounded up to a multiple of `PAGE`, so the work of a step follows the length of the rows. Where the
    extent of the length is not known, it is the number of all slots.
    """
    room = leaf.shape[-2]
    if known is not None:
        room = min(room, -(-(known.read_up_to + new) // PAGE) * PAGE)
    return room


def slots_for(max_len: int) -> int:
    """A number of slots that holds `max_len` tokens, and that no step of so many tokens reads in full.

    A compiled step has one graph for a part of the slots and another for all slots. So it needs only the first.
    """
    return -(-max_len // PAGE) * PAGE + 1


def check_room(leaf: Tensor | Forked, length: Tensor, known: Extent | None, new: int,
               after: Tensor | None = None) -> Tensor:
    """Return the length if every row of a layer's keys has room for `new` more tokens.

    `known` is the extent of the length, where it is known. Raises `ValueError` if a row has no room, and for a forked
    cache whose two parts do not fit together, as after an index into its leaves. `inside.py` explains how a compiled
    graph checks this, and what `after` is.
    """
    if isinstance(leaf, Forked) and not fits(leaf.shared.shape[:-3], leaf.own.shape[:-3]):
        shared, own = list(leaf.shared.shape[:-3]), list(leaf.own.shape[:-3])
        raise ValueError(f"this forked cache has rows of axes {own}, and what they share is of {shared}, which does "
                         "not fit; take some of its rows with lf.select")
    slots, least = leaf.shape[-2], start(leaf)
    if known is not None:
        check("length", known.minimum, known.maximum, least, slots, new)
        return length
    return inside(length, "length", least, slots, new, after)
