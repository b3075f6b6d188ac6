"""`fork` continues one sequence in many ways; `select` takes some rows of a cache."""

import torch
from torch import Tensor

from llama_fn.model.cache import Cache
from llama_fn.modes import concrete
from llama_fn.ops.inside import inside
from llama_fn.ops.slots import Forked
from llama_fn.ranges import integer


def fork(cache: Cache, batch: tuple[int, ...], *, max_len: int, at: int | None = None) -> Cache:
    """A cache with the new rows ``batch``, which all continue the given sequence and share its memory.

    `forward` takes it like any other cache. Each row has its own tokens after the first ``at``, and ``max_len`` slots
    in all. ``at`` None is the whole length, which is read. The new axes come before those that the cache has.

    A row cannot be rewound to before the fork. The shared leaves have the new axes with size 1: take rows with
    `select`, and map over the rows by ``Forked(None, 0)`` in ``in_dims`` of `torch.vmap`.

    Raises `ValueError`, where ``at`` is None, for rows of different lengths and for a length that cannot be read
    (compiled, mapped); for ``max_len`` that leaves no slot; and for a forked cache.

    >>> branches = lf.fork(cache, (5,), max_len=256)
    """
    _check_is_cache("fork", cache)
    if not isinstance(batch, tuple):
        raise ValueError(f"fork: batch is a tuple of sizes, as (5,) for five rows, got {batch!r}")
    batch = tuple(integer("fork: a size in batch", n, 1) for n in batch)
    max_len, at = integer("fork: max_len", max_len), None if at is None else integer("fork: at", at)
    if any(isinstance(leaf, Forked) for leaf in cache.k):
        raise ValueError("fork: this cache is forked already; fork the one that it came from")
    shared_len = _shared_length(cache.length, at)
    if max_len <= shared_len:
        raise ValueError(f"fork: max_len counts what is shared, too: more than {shared_len} is needed, got {max_len}")

    def forked(leaf: Tensor | Forked) -> Forked:
        *rows, k, _, h = leaf.shape
        assert isinstance(leaf, Tensor), "checked above"
        shared = leaf[..., :shared_len, :].reshape(*(1 for _ in batch), *rows, k, shared_len, h)
        return Forked(shared, leaf.new_zeros((*batch, *rows, k, max_len - shared_len, h)))

    length = cache.length.new_full((*batch, *cache.length.shape), shared_len)
    return Cache(tuple(forked(leaf) for leaf in cache.k), tuple(forked(leaf) for leaf in cache.v), length)


def select(cache: Cache, rows: Tensor | list[int]) -> Cache:
    """The given rows of a cache's first axis, in the given order; a row that is given twice continues in two ways.

    ``rows`` are row numbers, or a mask of booleans. What the rows of a forked cache share is not copied. Raises
    `ValueError` for a row that the cache does not have, for a mask of another shape, and for a cache without rows.

    >>> best = lf.select(branches, [4, 4, 2])
    """
    _check_is_cache("select", cache)
    rows, sizes = torch.as_tensor(rows, device=cache.length.device), cache.length.shape
    if not sizes:
        raise ValueError("select: the cache is of one sequence, and has no rows to choose from")
    if rows.dtype == torch.bool:
        if not 0 < rows.ndim <= len(sizes) or rows.shape != sizes[:rows.ndim]:
            raise ValueError(f"select: the mask is of shape {list(rows.shape)}, the cache's rows of {list(sizes)}")
    elif rows.numel() and (rows.is_floating_point() or rows.is_complex()):
        raise ValueError(f"select: rows are integers or a mask of booleans, got {rows.dtype}")
    else:  # as int64, since torch takes uint8 for a mask and an empty list for floats
        rows = inside(rows.long(), "row", -sizes[0], sizes[0])

    def selected(leaf: Tensor | Forked) -> Tensor | Forked:
        if isinstance(leaf, Forked):
            return Forked(leaf.shared if leaf.shared.shape[0] == 1 else leaf.shared[rows], leaf.own[rows])
        return leaf[rows]

    k, v = (tuple(map(selected, leaves)) for leaves in (cache.k, cache.v))
    return Cache(k, v, cache.length[rows])


def _shared_length(length: Tensor, at: int | None) -> int:
    """`at`, or the length that all rows have; raises `ValueError` where there is no such length."""
    if at is not None:
        if at < 0 or (concrete(length) and at > int(length.min())):
            raise ValueError(f"fork: rows part after 0 tokens or more, of those that all of them have, got at={at}")
        return at
    if not concrete(length):
        raise ValueError("fork: compiled or mapped, a cache's length cannot be read; give it as at=...")
    lengths = length.unique().tolist()
    if len(lengths) != 1:
        raise ValueError(f"fork: the rows must be of one length, got {lengths}; fork each by itself, or all at=...")
    return lengths[0]


def _check_is_cache(name: str, cache: Cache) -> None:
    if not isinstance(cache, Cache):
        raise ValueError(f"{name}: a cache is needed, got {type(cache).__name__}; make one with init_cache, and give "
                         "it to forward")
