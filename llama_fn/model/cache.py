"""The key/value cache: a value that goes in and comes out, never a state."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.config import Config
from llama_fn.shapes import concrete, typed


class Cache(NamedTuple):
    """Keys and values of the tokens so far: one leaf a layer, so that a compiled step can update each in place.

    `length` counts each row's tokens; the next token goes to slot `length`. To rewind or to fork a sequence,
    or to let rows differ, choose another length: `cache._replace(length=...)`. What lies beyond is never read.
    """

    k: tuple[Float[Tensor, "*b k s h"], ...]
    v: tuple[Float[Tensor, "*b k s h"], ...]
    length: Int[Tensor, "*b"]


class KeysValues(NamedTuple):
    """One layer's share of the cache."""

    k: Float[Tensor, "*b k s h"]
    v: Float[Tensor, "*b k s h"]


@typed
def init_cache(config: Config, batch: tuple[int, ...] = (), *, max_len: int, dtype: torch.dtype = torch.float32,
               device: torch.device | str | None = None) -> Cache:
    """An empty cache of `max_len` slots, for a batch of sequences, or (with `batch` left out) for one.

    Raises `ValueError` for fewer slots than one.
    """
    if max_len < 1:
        raise ValueError(f"init_cache: max_len must be at least 1, got {max_len}")
    shape = (*batch, config.n_kv_heads, max_len, config.head_dim)
    k, v = (tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)) for _ in "kv")
    return Cache(k, v, torch.zeros(batch, dtype=torch.int64, device=device))


@typed
def write(cache: KeysValues, keys: Float[Tensor, "*b k t h"], values: Float[Tensor, "*b k t h"],
          positions: Int[Tensor, "*b t"]) -> KeysValues:
    """A layer's cache with new keys and values at the slots `positions`; the old one stays valid."""
    return KeysValues(_put(cache.k, keys, positions), _put(cache.v, values, positions))


@typed
def read(cache: KeysValues, positions: Int[Tensor, "*b t"]) -> KeysValues:
    """What attention may see: every slot up to the last position, zeros beyond (a NaN there stays without effect)."""
    slots = torch.arange(cache.k.shape[-2], device=positions.device)
    beyond = rearrange(slots > positions[..., -1:], "... s -> ... 1 s 1")
    return KeysValues(*(leaf.masked_fill(beyond, 0) for leaf in cache))


def check_room(cache: Cache, new: int) -> None:
    """Raise `ValueError` if a row has no room for `new` tokens more. Where numbers cannot be read, do nothing."""
    if concrete(cache.length) and cache.length.numel():
        used, slots = int(cache.length.max()), cache.k[0].shape[-2]
        if (least := int(cache.length.min())) < 0:
            raise ValueError(f"a cache's length must be at least 0, got {least}")
        if used + new > slots:
            raise ValueError(f"the cache is full: it has {slots} slots, {used} are in use, and {new} more tokens came; "
                             f"make it with init_cache(..., max_len={used + new}) or more")


def _put(leaf: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    # index_put is what torch.compile turns into a write in place when the old cache is donated.
    k, s, h = leaf.shape[-3:]
    flat, rows = leaf.reshape(-1, k, s, h), positions.reshape(-1, positions.shape[-1])
    row = torch.arange(flat.shape[0], device=leaf.device)[:, None, None]
    head = torch.arange(k, device=leaf.device)[None, :, None]
    new = new.reshape(-1, *new.shape[-3:]).to(leaf.dtype)
    return flat.index_put((row, head, rows[:, None, :]), new).reshape(leaf.shape)
