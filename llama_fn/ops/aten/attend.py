"""Attention by torch's own kernels, and by sums that inductor fuses into loops."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.ops.aten import sdpa_rules
from llama_fn.ops.aten.few_rows import in_memory
from llama_fn.shapes import typed

BLOCK = 64  # queries


@typed
def fused(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
          positions: Int[Tensor, "*b t"] | None,
          segments: Int[Tensor, "*b t"] | None = None) -> Float[Tensor, "*b k g t h"]:
    """`written_out`, by torch's fused kernel, which holds no "t s" matrix of scores."""
    *batch, k, g, t, h = queries.shape
    heads = queries.reshape(-1, k * g, t, h)
    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    visible = None
    if positions is not None:
        slots = torch.arange(keys.shape[-2], device=queries.device)
        visible = (slots <= positions.reshape(-1, t, 1))[:, None]
    elif segments is not None:
        visible = (segments[..., None] == segments[..., None, :]).tril().reshape(-1, 1, t, t)
    if sdpa_rules.accepts(heads, keys, values):
        return sdpa_rules.attend(heads, keys, values, visible).reshape(*batch, k, g, t, h)
    grouped = {"enable_gqa": True} if g > 1 else {}  # in a compiled graph g > 1 may be symbolic; the flag must not be
    out = F.scaled_dot_product_attention(heads, keys, values, visible, is_causal=visible is None, **grouped)
    return out.reshape(*batch, k, g, t, h)


@typed
def in_blocks(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
              positions: Int[Tensor, "*b t"] | None) -> Float[Tensor, "*b k g t h"]:
    """`fused` for one block of queries after another, each over the slots up to the block's last position.

    Positions must be consecutive. Torch's kernel also computes masked scores; blocks leave out most of them.
    """
    t, s, parts = queries.shape[-2], keys.shape[-2], []
    if positions is None:
        positions = torch.arange(t, device=queries.device).expand(*queries.shape[:-4], t)
    for at in range(0, t, BLOCK):
        end = min(at + BLOCK, t)
        slots = s - t + end  # the last query's position is the last slot or an earlier one
        parts.append(fused(queries[..., at:end, :], keys[..., :slots, :], values[..., :slots, :],
                           positions[..., at:end]))
    return torch.cat(parts, -2)


@typed
def one_query(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
              positions: Int[Tensor, "*b t"]) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for one query a row (t = 1), as products and sums that inductor fuses into loops.

    The loops run at the memory's speed. One loop computes all heads of a group, so each key and value is read once.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    heads, k, v = in_memory(queries.to(exact)).unbind(-3), keys.to(exact), values.to(exact)
    slots = torch.arange(keys.shape[-2], device=queries.device)
    scores = torch.stack([(q * k).sum(-1) for q in heads], -2) / math.sqrt(queries.shape[-1])
    weights = in_memory(scores.masked_fill(slots > positions[..., None, None], -math.inf).softmax(-1))
    out = torch.stack([(w[..., None] * v).sum(-2) for w in weights.unbind(-2)], -2)
    return out[..., None, :].to(queries.dtype)
