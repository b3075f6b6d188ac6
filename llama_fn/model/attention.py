"""Grouped-query attention (Ainslie et al. 2023): g query heads share one key/value head, and the axes say so.

The written-out einsum is the definition. The fused kernel stands beside it and computes the same wherever it may.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from llama_fn.model import cache as kv
from llama_fn.model.cache import KeysValues
from llama_fn.model.linear import linear
from llama_fn.model.rope import Rotation, rotate
from llama_fn.shapes import typed


class Attention(NamedTuple):
    """The four matrices, with their heads. Query head i belongs to key/value head i // g."""

    wq: Float[Tensor, "k g h d"]
    wk: Float[Tensor, "k h d"]
    wv: Float[Tensor, "k h d"]
    wo: Float[Tensor, "d k g h"]


@typed
def attention(params: Attention, x: Float[Tensor, "*b t d"], rotation: Rotation, cache: KeysValues | None,
              positions: Int[Tensor, "*b t"] | None) -> tuple[Float[Tensor, "*b t d"], KeysValues | None]:
    """Each token looks at itself and at those before it: in this call, and in the cache if there is one.

    `positions` are the tokens' slots in the cache, None where there is none.
    """
    k, g, h, _ = params.wq.shape
    queries = rotate(linear(rearrange(params.wq, "k g h d -> (k g h) d"), x).unflatten(-1, (k * g, h)), rotation)
    keys = rotate(linear(rearrange(params.wk, "k h d -> (k h) d"), x).unflatten(-1, (k, h)), rotation)
    values = linear(rearrange(params.wv, "k h d -> (k h) d"), x).unflatten(-1, (k, h))

    queries = rearrange(queries, "... t (k g) h -> ... k g t h", k=k)
    keys, values = (rearrange(leaf, "... t k h -> ... k t h") for leaf in (keys, values))
    if cache is not None:
        cache = kv.write(cache, keys, values, positions)
        keys, values = kv.read(cache, positions)
    heads = attend(queries, keys.to(x.dtype), values.to(x.dtype), positions)
    out = linear(rearrange(params.wo, "d k g h -> d (k g h)"), rearrange(heads, "... k g t h -> ... t (k g h)"))
    return out, cache


@typed
def written_out(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"],
                values: Float[Tensor, "*b k s h"],
                positions: Int[Tensor, "*b t"] | None) -> Float[Tensor, "*b k g t h"]:
    """softmax(q k / sqrt(h)) v (Vaswani et al. 2017, eq. 1) over the slots up to each query's own position.

    The query at position p sees slots 0 to p; without `positions`, query i stands in slot i. The softmax is
    computed in float32 at least.
    """
    t, s, h = queries.shape[-2], keys.shape[-2], queries.shape[-1]
    if positions is None:
        positions = torch.arange(t, device=queries.device)
    hidden = rearrange(torch.arange(s, device=queries.device) > positions[..., None], "... t s -> ... 1 1 t s")
    scores = einsum(queries, keys, "... k g t h, ... k s h -> ... k g t s") / math.sqrt(h)
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(hidden, -math.inf)
    weights = exact.softmax(-1).to(values.dtype)
    return einsum(weights, values, "... k g t s, ... k s h -> ... k g t h")


@typed
def fused(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
          positions: Int[Tensor, "*b t"] | None) -> Float[Tensor, "*b k g t h"]:
    """`written_out`, by torch's fused kernel, which holds no "t s" matrix of scores."""
    *batch, k, g, t, h = queries.shape
    heads = queries.reshape(-1, k * g, t, h)
    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    visible = None
    if positions is not None:
        slots = torch.arange(keys.shape[-2], device=queries.device)
        visible = (slots <= positions.reshape(-1, t, 1))[:, None]
    out = F.scaled_dot_product_attention(heads, keys, values, visible, is_causal=visible is None, enable_gqa=g > 1)
    return out.reshape(*batch, k, g, t, h)


def attend(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None) -> Tensor:
    """The fused kernel for values and first derivatives; the definition under `vmap`, `jvp` and a second `grad`.

    The kernel has no rule for those transforms of `torch.func` (torch 2.13): it would raise, or run once a sample.
    """
    kernel = fused if _plain() else written_out
    return kernel(queries, keys, values, positions)


def _plain() -> bool:
    """Whether we run under no transform of `torch.func` but one `grad`: known while tracing, so one graph has one."""
    kinds = [interpreter.key() for interpreter in get_interpreter_stack() or ()]
    return not kinds or kinds == [TransformType.Grad]


_plain._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its import of a second
