"""The key/value cache: a value that goes in and comes out, never a state."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypeVar  # typing's has no default before Python 3.13

from llama_fn.config import Config
from llama_fn.model.checks import check, held, inside
from llama_fn.model.extent import extent
from llama_fn.modes import concrete, traced, transforms, unread
from llama_fn.private import is_mapped
from llama_fn.ranges import integer
from llama_fn.shapes import typed

PAGE = 64


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


class Cache(NamedTuple):
    """Keys and values of the tokens so far: one leaf a layer, so that a compiled step can update each in place.

    `length` counts each row's tokens; the next token goes to slot `length`. To rewind or to fork a sequence,
    or to let rows differ, choose another length: `cache._replace(length=...)`. What lies beyond is never read.
    """

    k: tuple[Float[Tensor, "*b k s h"] | Forked, ...]
    v: tuple[Float[Tensor, "*b k s h"] | Forked, ...]
    length: Int[Tensor, "*b"]


class NoCache(NamedTuple):
    """No cache, as a value: a tree without leaves, false like `None`. Other than `None`, it passes through every
    transform as a result, and it may be given wherever a cache is optional.
    """


class KeysValues(NamedTuple):
    """One layer's share of the cache."""

    k: Float[Tensor, "*b k s h"] | Forked
    v: Float[Tensor, "*b k s h"] | Forked


# A cache, or none. In a signature: what comes out is of the kind that went in.
AnyCache = TypeVar("AnyCache", bound=Cache | NoCache, default=NoCache)
AnyKeysValues = TypeVar("AnyKeysValues", bound=KeysValues | NoCache, default=NoCache)


@typed
def init_cache(config: Config, batch: tuple[int, ...] = (), *, max_len: int, dtype: torch.dtype = torch.float32,
               device: torch.device | str = "cpu") -> Cache:
    """An empty cache of `max_len` slots, for a batch of sequences, or (with `batch` left out) for one.

    `max_len` may exceed `config.max_seq_len`: see `forward`. Raises `ValueError` for fewer slots than one, for a batch
    axis below 0, and for a dtype that is no floating one.
    """
    max_len = integer("init_cache: max_len", max_len, 1)
    batch = tuple(integer("init_cache: an axis of batch", n, 0) for n in batch)
    if not dtype.is_floating_point:
        raise ValueError(f"init_cache: keys and values are of a floating dtype, got {dtype}")
    shape = (*batch, config.n_kv_heads, max_len, config.head_dim)
    k, v = (tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)) for _ in "kv")
    return Cache(k, v, torch.zeros(batch, dtype=torch.int64, device=device))


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
    `ValueError` for a row that is not there.
    """
    rows = torch.as_tensor(rows, device=cache.length.device)
    if rows.dtype != torch.bool:
        count = len(cache.length)
        rows = inside(rows, "row", -count, count)

    def some(leaf: Tensor | Forked) -> Tensor | Forked:
        if isinstance(leaf, Forked):
            return Forked(leaf.shared if leaf.shared.shape[0] == 1 else leaf.shared[rows], leaf.own[rows])
        return leaf[rows]

    k, v = (tuple(map(some, leaves)) for leaves in cache[:2])
    return Cache(k, v, cache.length[rows])


@typed
def write(cache: KeysValues, keys: Float[Tensor, "*b k t h"], values: Float[Tensor, "*b k t h"],
          positions: Int[Tensor, "*b t"]) -> KeysValues:
    """A layer's cache with new keys and values at the slots `positions`; the old one stays valid."""
    return KeysValues(_put(cache.k, keys, positions), _put(cache.v, values, positions))


def placed(cache: KeysValues, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`x` "*b t d" and the slots "*b t" to write it to. In a graph, which may be of this layer alone, and where nothing
    reads the positions, one without a slot gets the nearest slot, and a NaN as its x.
    """
    if not traced() and not unread(positions):
        return x, positions
    slots, outside = held(positions, _start(cache.k), cache.k.shape[-2])
    return x.masked_fill(outside[..., None], torch.nan), slots


def read(cache: KeysValues, slots: Tensor) -> KeysValues:
    """The first `slots`. Its axis s is shorter than the cache's, so this function is not `typed`."""
    return KeysValues(*(_first(leaf, slots.shape[0]) for leaf in cache))


def visible(leaf: Tensor | Forked, positions: Tensor) -> Tensor | Forked:
    """The slots that attention may see: all up to the last position, zeros beyond (a NaN there stays without effect).
    """
    if isinstance(leaf, Forked):
        # Where vmap took an axis off a row's own slots, what is shared has one of size 1 too many.
        shared = leaf.shared if leaf.shared.ndim <= leaf.own.ndim else leaf.shared.reshape(leaf.shared.shape[-3:])
        return Forked(shared, visible(leaf.own, positions - shared.shape[-2]))
    slots = torch.arange(leaf.shape[-2], device=positions.device)
    return leaf.masked_fill(rearrange(slots > positions[..., -1:], "... s -> ... 1 s 1"), 0)


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
    """The cache. Raises `ValueError` if a row has no room for `new` tokens more (see `checks`, `after` too), and for a
    forked cache with an index in what its rows share.
    """
    if isinstance(cache.k[0], Forked) and not _fits(*(leaf.shape[:-3] for leaf in cache.k[0])):
        shared, own = (list(leaf.shape[:-3]) for leaf in cache.k[0])
        raise ValueError(f"this forked cache has rows of axes {own}, and what they share is of {shared}, which does "
                         "not fit; take some of its rows with lf.select")
    slots, start = cache.k[0].shape[-2], _start(cache.k[0])
    if (known := extent(cache.length)) is not None:
        check("length", known.least, known.most, start, slots, new)
        return cache
    return cache._replace(length=inside(cache.length, "length", start, slots, new, after))


def _put(leaf: Tensor | Forked, new: Tensor, positions: Tensor) -> Tensor | Forked:
    if isinstance(leaf, Forked):
        return leaf._replace(own=_put(leaf.own, new, positions - leaf.shared.shape[-2]))
    *rows, _, _ = leaf.shape  # and heads
    slots, new = positions[..., None, :], new.to(leaf.dtype)
    if _may_be_expanded(leaf):
        return leaf.scatter(-2, slots[..., None].expand(new.shape), new)
    # index_put is what torch.compile turns into a write in place when the old cache is donated.
    axes = [torch.arange(n, device=leaf.device).reshape(n, *[1] * (len(rows) - i)) for i, n in enumerate(rows)]
    return leaf.contiguous().index_put((*axes, slots), new)


def _first(leaf: Tensor | Forked, slots: int) -> Tensor | Forked:
    if isinstance(leaf, Forked):
        return leaf._replace(own=_first(leaf.own, slots - leaf.shared.shape[-2]))
    return leaf[..., :slots, :]


def _start(leaf: Tensor | Forked) -> int:
    """The first slot that a row may write to."""
    return leaf.shared.shape[-2] if isinstance(leaf, Forked) else 0


def _fits(shared: torch.Size, own: torch.Size) -> bool:
    """Whether the batch axes of what is shared are those of the rows, or 1; a fork of one may have more, all 1."""
    ends = zip(reversed(shared), reversed(own), strict=False)
    return set(shared) <= {1} or (len(shared) <= len(own) and all(a in (1, b) for a, b in ends))


def _may_be_expanded(leaf: Tensor) -> bool:
    """Whether `vmap` or forward mode will expand the leaf, or the zeros that are its tangent, to the size of what is
    written. Inductor would write in place into such a view too, all rows into one (torch 2.13, pytorch#188084).
    """
    levels = transforms()
    return levels > 1 or (levels == 1 and not is_mapped(leaf))
