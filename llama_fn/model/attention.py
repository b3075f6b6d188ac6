"""Grouped-query attention (Ainslie et al. 2023): g query heads share one key/value head, and the axes say so.

`written_out` is the definition. `ops/attend.py` has the kernels that compute the same faster, and chooses one.
"""

import math
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.model.cache import AnyKeysValues, NoCache, read, write
from llama_fn.model.linear import linear, linears
from llama_fn.model.rope import Rotation, rotate
from llama_fn.ops.attend import attend
from llama_fn.ops.slots import Forked, nearest
from llama_fn.ops.weight import Matrix
from llama_fn.shapes import typed


class Attention(NamedTuple):
    """The four matrices, with their heads. Query head i belongs to key/value head i // g."""

    wq: Float[Matrix, "k g h d"]
    wk: Float[Matrix, "k h d"]
    wv: Float[Matrix, "k h d"]
    wo: Float[Matrix, "d k g h"]


@typed
def attention(params: Attention, x: Float[Tensor, "*b t d"], rotation: Rotation, cache: AnyKeysValues | None,
              positions: Int[Tensor, "*b t"] | None,
              slots: Int[Tensor, "_"] | None) -> tuple[Float[Tensor, "*b t d"], AnyKeysValues]:
    """Each token looks at itself and at those before it: in this call, and in the cache if there is one.

    `positions` are the tokens' slots in the cache, `slots` those of it that are read; both None where there is no
    cache. The second result is the layer's cache with the tokens in it, or `NoCache()`.
    """
    cache = cache or NoCache()
    if cache:
        x, places = nearest(cache.k, x, positions)
    queries, keys, values = linears((params.wq, params.wk, params.wv), x)
    queries = rotate(rearrange(queries, "... t k g h -> ... t (k g) h"), rotation)
    keys = rotate(keys, rotation)

    queries = rearrange(queries, "... t (k g) h -> ... k g t h", k=keys.shape[-2])
    keys, values = (rearrange(leaf, "... t k h -> ... k t h") for leaf in (keys, values))
    if cache:
        cache = write(cache, keys, values, places)
        keys, values = read(cache, slots)
    heads = attend(written_out, queries, keys, values, positions)
    return linear(params.wo, rearrange(heads, "... k g t h -> ... t k g h"), inputs=3), cache


@typed
def written_out(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"] | Forked,
                values: Float[Tensor, "*b k s h"] | Forked,
                positions: Int[Tensor, "*b t"] | None) -> Float[Tensor, "*b k g t h"]:
    """softmax(q k / sqrt(h)) v (Vaswani et al. 2017, eq. 1) over the slots up to each query's own position.

    The query at position p sees slots 0 to p; without `positions`, query i stands in slot i. The softmax is
    computed in float32 at least. The slots may lie in two places, of which neither is copied.
    """
    places = list(zip(keys, values, strict=True)) if isinstance(keys, Forked) else [(keys, values)]
    t, h = queries.shape[-2:]
    scores = torch.cat([einsum(queries, k, "... k g t h, ... k s h -> ... k g t s") for k, _ in places], -1)
    if positions is None:
        positions = torch.arange(t, device=queries.device)
    slots = torch.arange(scores.shape[-1], device=queries.device)
    hidden = rearrange(slots > positions[..., None], "... t s -> ... 1 1 t s")
    exact = (scores / math.sqrt(h)).to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(hidden, -math.inf)
    weights = exact.softmax(-1).to(queries.dtype).split([k.shape[-2] for k, _ in places], -1)
    return sum(einsum(w, v, "... k g t s, ... k s h -> ... k g t h") for w, (_, v) in zip(weights, places, strict=True))
