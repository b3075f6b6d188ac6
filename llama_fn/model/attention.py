"""Grouped-query attention (Ainslie et al. 2023): each key/value head (axis k) serves a group of g query heads.

`written_out` is the definition. `ops/attend.py` holds faster implementations of it, and chooses one.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.model.cache import AnyKeysValues, KeysValues, NoCache, read, write
from llama_fn.model.linear import linear, linears
from llama_fn.model.rope import Rotation, rotate
from llama_fn.ops.attend import attend
from llama_fn.ops.slots import Forked, nearest
from llama_fn.ops.weight import Matrix
from llama_fn.shapes import typed


class Attention(NamedTuple):
    """The four matrices, with their heads as axes. Query head i uses key/value head i // g."""

    wq: Float[Matrix, "k g h d"]
    wk: Float[Matrix, "k h d"]
    wv: Float[Matrix, "k h d"]
    wo: Float[Matrix, "d k g h"]


@typed
def written_out(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"] | Forked,
                values: Float[Tensor, "*b k s h"] | Forked,
                positions: Int[Tensor, "*b t"] | None,
                segments: Int[Tensor, "*b t"] | None = None) -> Float[Tensor, "*b k g t h"]:
    """The definition: softmax(q k / sqrt(h)) v (Vaswani et al. 2017, eq. 1), with the future masked.

    A query at position p attends to slots 0 to p. Without `positions`, query i attends to its segment's tokens up to i.
    The softmax is computed in float32 at least. A forked cache's slots are in two tensors, which are not concatenated.
    """
    (key_parts, value_parts) = (list(x) if isinstance(x, Forked) else [x] for x in (keys, values))
    t, h = queries.shape[-2:]
    scores = torch.cat([einsum(queries, k, "... k g t h, ... k s h -> ... k g t s") for k in key_parts], -1)
    if positions is None:
        positions = torch.arange(t, device=queries.device)
    slots = torch.arange(scores.shape[-1], device=queries.device)
    hidden = slots > positions[..., None]
    if segments is not None:
        hidden = hidden | (segments[..., None, :] != segments[..., None])
    upcast = (scores / math.sqrt(h)).to(torch.promote_types(scores.dtype, torch.float32))
    weights = upcast.masked_fill(rearrange(hidden, "... t s -> ... 1 1 t s"), -math.inf).softmax(-1).to(queries.dtype)
    parts = zip(weights.split([k.shape[-2] for k in key_parts], -1), value_parts, strict=True)
    return functools.reduce(torch.add, (einsum(w, v, "... k g t s, ... k s h -> ... k g t h") for w, v in parts))


@typed
def attention(params: Attention, x: Float[Tensor, "*b t d"], rotation: Rotation, cache: AnyKeysValues | None,
              positions: Int[Tensor, "*b t"] | None, slots: Int[Tensor, "_"] | None,
              segments: Int[Tensor, "*b t"] | None = None) -> tuple[Float[Tensor, "*b t d"], AnyKeysValues]:
    """Each token attends to itself and to the tokens before it in its segment, those in the cache included.

    With a cache, `positions` are the slots to which the keys and values of these tokens are written, and `slots` are
    the slots that are read. Without one, both are None. The second result is the layer's cache with these tokens in it,
    or `NoCache()`.
    """
    new_cache: Any = NoCache()
    places = positions
    if isinstance(cache, KeysValues):
        assert positions is not None and slots is not None, "with a cache, positions and slots are given"
        x, places = nearest(cache.k, x, positions)
    queries, keys, values = linears((params.wq, params.wk, params.wv), x)
    queries = rotate(rearrange(queries, "... t k g h -> ... t (k g) h"), rotation)
    keys = rotate(keys, rotation)

    queries = rearrange(queries, "... t (k g) h -> ... k g t h", k=keys.shape[-2])
    keys, values = (rearrange(y, "... t k h -> ... k t h") for y in (keys, values))
    if isinstance(cache, KeysValues) and places is not None and slots is not None:
        new_cache = write(cache, keys, values, places)
        keys, values = read(new_cache, slots)
    heads = attend(written_out, queries, keys, values, positions, segments)
    return linear(params.wo, rearrange(heads, "... k g t h -> ... t k g h"), inputs=3), new_cache
