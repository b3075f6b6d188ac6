"""Sequences that began as one, and some rows of a cache."""

import torch
from torch import Tensor

from llama_fn.model.cache import Cache
from llama_fn.modes import concrete
from llama_fn.ops.inside import inside
from llama_fn.ops.slots import Forked
from llama_fn.ranges import integer


def fork(cache: Cache, batch: tuple[int, ...], *, max_len: int, at: int | None = None) -> Cache:
    """Sequences that go on from one, as many as `batch` has: what they share lies in memory once, for all of them.

    `forward` takes the result as any other cache, each row with its own tokens, up to `max_len` in all. A row cannot be
    rewound to before the fork. The rows of a cache with batch axes are each forked; the new axes come first. They part
    after `at` tokens; None is all that the cache holds, which is read off its length.

    What is shared has the new axes, too, of size 1. Some of the rows are `select(cache, rows)`: an index of one's own,
    `lf.tree.map(lambda x: x[rows], cache)`, is an error there beyond row 0, as is mapping over it. Under `vmap`, map
    `Forked(None, 0)`.

    Raises `ValueError` where rows differ in length or it cannot be read (compiled, mapped) and there is no `at`, where
    nothing is left of `max_len`, and for a forked cache. (Its axis s has two sizes, so this function is not `typed`.)
    """
    _check_some("fork", cache)
    if not isinstance(batch, tuple):
        raise ValueError(f"fork: batch is a tuple of sizes, as (5,) for five rows, got {batch!r}")
    batch = tuple(integer("fork: a size in batch", n, 1) for n in batch)
    max_len, at = integer("fork: max_len", max_len), None if at is None else integer("fork: at", at)
    if any(isinstance(leaf, Forked) for leaf in cache.k):
        raise ValueError("fork: this cache is forked already; fork the one that it came from")
    if at is None:
        if not concrete(cache.length):
            raise ValueError("fork: compiled or mapped, a cache's length cannot be read; give it as at=...")
        lengths = cache.length.unique().tolist()
        if len(lengths) != 1:
            raise ValueError(f"fork: the rows must be of one length, got {lengths}; fork each by itself, or all at=...")
        at = lengths[0]
    elif at < 0 or (concrete(cache.length) and at > int(cache.length.min())):
        raise ValueError(f"fork: rows part after 0 tokens or more, of those that all of them have, got at={at}")
    if max_len <= at:
        raise ValueError(f"fork: max_len counts what is shared, too: more than {at} is needed, got {max_len}")

    def forked(leaf: Tensor) -> Forked:
        *rows, k, _, h = leaf.shape
        shared = leaf[..., :at, :].reshape(*(1 for _ in batch), *rows, k, at, h)
        return Forked(shared, leaf.new_zeros((*batch, *rows, k, max_len - at, h)))

    k, v = (tuple(map(forked, leaves)) for leaves in cache[:2])
    return Cache(k, v, cache.length.new_full((*batch, *cache.length.shape), at))


def select(cache: Cache, rows: Tensor | list[int]) -> Cache:
    """Some rows of the first axis, in the order given: numbers, or a mask. The same row twice is a fork of it.

    What the rows of a forked cache share stays in memory once, where an index into each leaf would go wrong. Raises
    `ValueError` for a row that is not there, for a mask of another size, and for a cache without rows.
    """
    _check_some("select", cache)
    rows, sizes = torch.as_tensor(rows, device=cache.length.device), cache.length.shape
    if not sizes:
        raise ValueError("select: the cache is of one sequence, and has no rows to choose from")
    if rows.dtype == torch.bool:
        if not 0 < rows.ndim <= len(sizes) or rows.shape != sizes[:rows.ndim]:
            raise ValueError(f"select: the mask is of shape {list(rows.shape)}, the cache's rows of {list(sizes)}")
    elif rows.numel() and (rows.is_floating_point() or rows.is_complex()):
        raise ValueError(f"select: rows are integers or a mask of booleans, got {rows.dtype}")
    else:  # torch takes bytes for a mask, and an empty list for floats
        rows = inside(rows.long(), "row", -sizes[0], sizes[0])

    def some(leaf: Tensor | Forked) -> Tensor | Forked:
        if isinstance(leaf, Forked):
            return Forked(leaf.shared if leaf.shared.shape[0] == 1 else leaf.shared[rows], leaf.own[rows])
        return leaf[rows]

    k, v = (tuple(map(some, leaves)) for leaves in cache[:2])
    return Cache(k, v, cache.length[rows])


def _check_some(what: str, cache: Cache) -> None:
    if not isinstance(cache, Cache):
        raise ValueError(f"{what}: a cache is needed, got {type(cache).__name__}; make one with init_cache, and give "
                         "it to forward")
