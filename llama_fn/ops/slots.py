"""The slots of one layer's keys or values: a tensor, or, of sequences that began as one, in two places."""

from typing import NamedTuple, overload

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from llama_fn.modes import traced, transforms, unread
from llama_fn.ops.inside import clamped
from llama_fn.private import is_mapped


class Forked(NamedTuple):
    """The slots of several sequences that began as one: those of the beginning, there once, and each one's own.

    `shared` has an axis of size 1 where `own` has one of rows that began as one.
    """

    shared: Float[Tensor, "... k _ h"]
    own: Float[Tensor, "*b k s h"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the slots if they lay side by side."""
        *batch, s, h = self.own.shape
        return *batch, self.shared.shape[-2] + s, h


@overload
def visible(leaf: Tensor, positions: Tensor) -> Tensor: ...
@overload
def visible(leaf: Tensor | Forked, positions: Tensor) -> Tensor | Forked: ...
def visible(leaf: Tensor | Forked, positions: Tensor) -> Tensor | Forked:
    """The slots that attention may see: all up to the last position, and zeros after it.

    So a NaN in a slot after the last position has no effect.
    """
    if isinstance(leaf, Forked):
        # Where vmap took an axis off a row's own slots, what is shared has one of size 1 too many.
        shared = leaf.shared if leaf.shared.ndim <= leaf.own.ndim else leaf.shared.reshape(leaf.shared.shape[-3:])
        return Forked(shared, visible(leaf.own, positions - shared.shape[-2]))
    slots = torch.arange(leaf.shape[-2], device=positions.device)
    return leaf.masked_fill(rearrange(slots > positions[..., -1:], "... s -> ... 1 s 1"), 0)


def nearest(leaf: Tensor | Forked, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`x` "*b t d", and the slots "*b t" to which its keys and values are written.

    Where nothing has checked that a position has a slot (in a graph, which may be of one layer alone, and on a GPU that
    is not waited for), a position without one is moved to the nearest slot, and its x becomes NaN.
    """
    if not traced() and not unread(positions):
        return x, positions
    slots, outside = clamped(positions, start(leaf), leaf.shape[-2])
    return x.masked_fill(outside[..., None], torch.nan), slots


def put(leaf: Tensor | Forked, new: Tensor, positions: Tensor) -> Tensor | Forked:
    """The leaf with `new` "*b k t h" in the slots `positions` "*b t"; the old leaf is not changed."""
    if isinstance(leaf, Forked):
        return leaf._replace(own=put(leaf.own, new, positions - leaf.shared.shape[-2]))
    *rows, _, _ = leaf.shape  # and heads
    slots, new = positions[..., None, :], new.to(leaf.dtype)
    if _may_be_expanded(leaf):
        return leaf.scatter(-2, slots[..., None].expand(new.shape), new)
    # index_put is what torch.compile turns into a write in place when the old cache is donated.
    axes = [torch.arange(n, device=leaf.device).reshape(n, *[1] * (len(rows) - i)) for i, n in enumerate(rows)]
    return leaf.contiguous().index_put((*axes, slots), new)


def first(leaf: Tensor | Forked, slots: int) -> Tensor | Forked:
    """The first `slots` of the leaf."""
    if isinstance(leaf, Forked):
        return leaf._replace(own=first(leaf.own, slots - leaf.shared.shape[-2]))
    return leaf[..., :slots, :]


def start(leaf: Tensor | Forked) -> int:
    """The first slot that a row may write to."""
    return leaf.shared.shape[-2] if isinstance(leaf, Forked) else 0


def fits(shared: torch.Size, own: torch.Size) -> bool:
    """Whether the batch axes of what is shared are those of the rows, or 1; a fork of one may have more, all 1."""
    ends = zip(reversed(shared), reversed(own), strict=False)
    return set(shared) <= {1} or (len(shared) <= len(own) and all(a in (1, b) for a, b in ends))


def _may_be_expanded(leaf: Tensor) -> bool:
    """Whether `vmap` or forward mode will expand the leaf, or its zero tangent, to the size of what is written.

    Inductor would write in place into such a view too, and so all rows into one (torch 2.13, pytorch#188084).
    """
    levels = transforms()
    return levels > 1 or (levels == 1 and not is_mapped(leaf))
