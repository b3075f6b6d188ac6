"""The key/value cache: a value that goes in and comes out, never a state."""

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


@typed
def write(cache: KeysValues, keys: Float[Tensor, "*b k t h"], values: Float[Tensor, "*b k t h"],
          positions: Int[Tensor, "*b t"]) -> KeysValues:
    """A layer's cache with new keys and values at the slots `positions`; the old one stays valid."""
    return KeysValues(put(cache.k, keys, positions), put(cache.v, values, positions))


def read(cache: KeysValues, slots: Tensor) -> KeysValues:
    """The first `slots`. Its axis s is shorter than the cache's, so this function is not `typed`."""
    return KeysValues(*(first(leaf, slots.shape[0]) for leaf in cache))
