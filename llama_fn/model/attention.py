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

from llama_fn import tree
from llama_fn.model import cache as kv
from llama_fn.model.cache import AnyKeysValues, Forked, NoCache
from llama_fn.model.linear import linear, linears
from llama_fn.model.rope import Rotation, rotate
from llama_fn.modes import forward_mode, transforms, twice
from llama_fn.ops.aten import sdpa_rules as sdpa
from llama_fn.ops.aten.inductor_sums import in_memory
from llama_fn.ops.cpu import build as avx2
from llama_fn.ops.weight import Matrix
from llama_fn.shapes import typed

BLOCK = 64  # queries


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
        x, places = kv.placed(cache, x, positions)
    queries, keys, values = linears((params.wq, params.wk, params.wv), x)
    queries = rotate(rearrange(queries, "... t k g h -> ... t (k g) h"), rotation)
    keys = rotate(keys, rotation)

    queries = rearrange(queries, "... t (k g) h -> ... k g t h", k=keys.shape[-2])
    keys, values = (rearrange(leaf, "... t k h -> ... k t h") for leaf in (keys, values))
    if cache:
        cache = kv.write(cache, keys, values, places)
        keys, values = kv.read(cache, slots)
    heads = attend(queries, keys, values, positions)
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
    grouped = {"enable_gqa": True} if g > 1 else {}  # the flag itself may not be symbolic in a compiled graph
    out = F.scaled_dot_product_attention(heads, keys, values, visible, is_causal=visible is None, **grouped)
    return out.reshape(*batch, k, g, t, h)


@typed
def in_blocks(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
              positions: Int[Tensor, "*b t"] | None) -> Float[Tensor, "*b k g t h"]:
    """`fused` of positions that follow each other, a block of queries after the other, each over the slots up to its
    end: the kernel computes what is hidden, too.
    """
    t, s, parts = queries.shape[-2], keys.shape[-2], []
    if positions is None:
        positions = torch.arange(t, device=queries.device).expand(*queries.shape[:-4], t)
    for at in range(0, t, BLOCK):
        end = min(at + BLOCK, t)
        slots = s - t + end  # the last query stands in the last slot, or before it
        parts.append(fused(queries[..., at:end, :], keys[..., :slots, :], values[..., :slots, :],
                           positions[..., at:end]))
    return torch.cat(parts, -2)


@typed
def one_query(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
              positions: Int[Tensor, "*b t"]) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for one query a row (t = 1), as a compiler likes it: products and sums, at the speed of memory. The
    heads of a group stand side by side in one loop, so that a key or a value is read once for all of them.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    heads, k, v = in_memory(queries.to(exact)).unbind(-3), keys.to(exact), values.to(exact)
    slots = torch.arange(keys.shape[-2], device=queries.device)
    scores = torch.stack([(q * k).sum(-1) for q in heads], -2) / math.sqrt(queries.shape[-1])
    weights = in_memory(scores.masked_fill(slots > positions[..., None, None], -math.inf).softmax(-1))
    out = torch.stack([(w[..., None] * v).sum(-2) for w in weights.unbind(-2)], -2)
    return out[..., None, :].to(queries.dtype)


@typed
def by_triton(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
              positions: Int[Tensor, "*b t"]) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for one query a row on a GPU, by a kernel of `gpu_attention`."""
    from llama_fn.ops.gpu import attend as gpu_attention  # noqa: F401  it imports triton, and defines the operator

    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    heads = queries.reshape(-1, *queries.shape[-4:-2], queries.shape[-1])
    return torch.ops.llama_fn.attention(heads, keys, values, positions.reshape(-1)).reshape(queries.shape)


@typed
def by_cpp(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
           positions: Int[Tensor, "*b t"]) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for one query a row on the CPU, by a kernel in C++ (see `avx2`)."""
    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    heads = queries.reshape(-1, *queries.shape[-4:-2], queries.shape[-1]).float()
    return avx2.one_query(heads, keys, values, positions.reshape(-1)).to(queries.dtype).reshape(queries.shape)


@typed
def many_by_cpp(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"],
                values: Float[Tensor, "*b k s h"],
                positions: Int[Tensor, "*b t"] | None) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for any queries on the CPU, by a kernel in C++ that holds no "t s" matrix and skips what is hidden.
    """
    *batch, k, g, t, h = queries.shape
    if positions is None:
        positions = torch.arange(t, device=queries.device).expand(*batch, t)
    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    heads = avx2.many_queries(queries.reshape(-1, k, g, t, h), keys, values, positions.reshape(-1, t))
    return heads.reshape(queries.shape)


def attend(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> Tensor:
    """The fused kernel for values and first derivatives, mapped or not; the definition for what lies beyond; and in a
    compiled step, kernels of our own: for one query, where the fused kernel reaches a tenth of the memory's speed, and
    on the CPU for many, where it takes 2 to 3 times as long.
    """
    one = torch.compiler.is_compiling() and positions is not None and queries.shape[-2] == 1
    # The kernel has a second derivative (`sdpa`), but computes again what it did not keep: 3 to 15 % slower.
    beyond = isinstance(keys, Forked) or forward_mode() or twice()
    if one and not beyond and _for_triton(queries):
        return by_triton(queries, keys, values, positions)
    if torch.compiler.is_compiling() and not beyond and _for_cpp(queries, keys, values):
        return (by_cpp if one else many_by_cpp)(queries, keys, values, positions)
    if positions is not None:
        keys, values = kv.visible(keys, positions), kv.visible(values, positions)
    keys, values = (tree.map(lambda leaf: leaf.to(queries.dtype), part) for part in (keys, values))
    kernel = written_out if beyond else one_query if one else in_blocks if _many(queries, keys, values) else fused
    return kernel(queries, keys, values, positions)


def _many(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `in_blocks` is faster: of 256 tokens 0.8 of the time, of 512 three quarters, by AVX2 half."""
    return (queries.device.type == "cpu" and queries.shape[-2] > BLOCK and not transforms()
            and not torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
            and not any(x.requires_grad for x in (queries, keys, values)))


def _for_triton(queries: Tensor) -> bool:
    return _by_layers(queries) and queries.is_cuda and queries.dtype != torch.float64


def _for_cpp(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    return _by_layers(queries) and queries.dtype in avx2.FLOATS and avx2.attends(queries, keys, values)


def _by_layers(queries: Tensor) -> bool:
    """Whether values alone are asked for, by no transform, dynamo or exporter, which know none of our kernels."""
    return (not torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not transforms()
            and not queries.requires_grad)


_LIBRARY = sdpa.register()
