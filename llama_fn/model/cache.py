"""The key/value cache: a value that goes into `forward` and comes out of it, never a hidden state."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypeVar  # typing's has no default before Python 3.13

from llama_fn.config import Config
from llama_fn.ops.slots import Forked, first, put
from llama_fn.ranges import integer
from llama_fn.shapes import typed


class Cache(NamedTuple):
    """The keys and values of all tokens so far; every layer has one tensor of keys and one of values.

    ``length`` counts the tokens of each row, and the next token goes to slot ``length``. Slots from ``length`` on are
    never read. So another ``length`` rewinds a row, and rows may have different lengths.

    >>> longer: lf.Cache = lf.forward(params, tokens, cache)[1]
    >>> rewound = longer._replace(length=longer.length - 3)
    """

    k: tuple[Float[Tensor, "*b k s h"] | Forked, ...]
    v: tuple[Float[Tensor, "*b k s h"] | Forked, ...]
    length: Int[Tensor, "*b"]


class NoCache(NamedTuple):
    """The absence of a cache, as a tree without leaves; like None it is false, and may be passed as a cache.

    `forward` returns it where no cache was given: every transform accepts it as a result, and `torch.vmap` does not
    accept None.

    >>> assert lf.forward(params, tokens)[1] == lf.NoCache()
    """


class KeysValues(NamedTuple):
    """The keys and values of one layer."""

    k: Float[Tensor, "*b k s h"] | Forked
    v: Float[Tensor, "*b k s h"] | Forked


# A cache or `NoCache`. Used twice in a signature, they say that the result is of the same kind as the argument.
AnyCache = TypeVar("AnyCache", bound=Cache | NoCache, default=NoCache)
AnyKeysValues = TypeVar("AnyKeysValues", bound=KeysValues | NoCache, default=NoCache)


@typed
def init_cache(config: Config, batch: tuple[int, ...] = (), *, max_len: int, dtype: torch.dtype = torch.float32,
               device: torch.device | str = "cpu", heads: int | None = None) -> Cache:
    """An empty cache of ``max_len`` slots, one token each, for every row of ``batch``; by default for one sequence.

    Keys and values have the axes ``*b k s h``, where ``*b`` is ``batch`` and s is ``max_len``, which may exceed
    ``config.max_seq_len`` (see `forward`). ``heads`` is k where a device has a part of the heads. Raises `ValueError`
    for ``max_len`` below 1, for a negative size in ``batch``, and for a dtype that is not floating.

    >>> cache = lf.init_cache(config, (2,), max_len=256)
    """
    max_len = integer("init_cache: max_len", max_len, 1)
    batch = tuple(integer("init_cache: an axis of batch", n, 0) for n in batch)
    if not dtype.is_floating_point:
        raise ValueError(f"init_cache: keys and values are of a floating dtype, got {dtype}")
    heads = config.n_kv_heads if heads is None else integer("init_cache: heads", heads, 1)
    shape = (*batch, heads, max_len, config.head_dim)
    k, v = (tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)) for _ in "kv")
    return Cache(k, v, torch.zeros(batch, dtype=torch.int64, device=device))


@typed
def write(cache: KeysValues, keys: Float[Tensor, "*b k t h"], values: Float[Tensor, "*b k t h"],
          positions: Int[Tensor, "*b t"]) -> KeysValues:
    """A layer's cache with these keys and values in the slots `positions`. The old cache stays valid."""
    return KeysValues(put(cache.k, keys, positions), put(cache.v, values, positions))


def read(cache: KeysValues, slots: Tensor) -> KeysValues:
    """The first slots of a layer's cache, as many as `slots` has."""  # not `typed`: the axis s has two sizes here
    return KeysValues(first(cache.k, slots.shape[0]), first(cache.v, slots.shape[0]))
