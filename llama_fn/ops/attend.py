"""Attention, computed fast: the first implementation in `TABLE` that accepts the arguments runs.

The definition is in `model/attention.py`. The model passes it in, and it runs if no implementation accepts. Every
implementation is tested against it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn import tree
from llama_fn.modes import by_layers, compiling, eager, forward_mode, transforms, twice
from llama_fn.ops.aten import sdpa_rules
from llama_fn.ops.aten.inductor_sums import in_memory
from llama_fn.ops.cpu import build as avx2
from llama_fn.ops.slots import Forked, visible
from llama_fn.shapes import typed

BLOCK = 64  # queries
Attend = Callable[..., Tensor]  # of queries, keys, values and positions; most accept only some of them


class Implementation(NamedTuple):
    """A way to attend, and whether it accepts queries, keys, values and positions.

    One that is `compiled` is only for compiled steps, and is skipped in eager mode.
    """

    compute: Attend
    accepts: Callable[[Tensor, Tensor | Forked, Tensor | Forked, Tensor | None], bool]
    compiled: bool = False


def attend(definition: Attend, queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked,
           positions: Tensor | None, segments: Tensor | None = None) -> Tensor:
    """Attention by the first implementation of `TABLE` that accepts these arguments, or else by the definition.

    Only `fused` and the definition support segments.
    """
    if segments is not None:
        kernel: Attend = definition if _needs_definition(keys) else fused
        return kernel(queries, keys, values, positions, segments)
    compiled = compiling()
    for compute, accepts, compiled_only in TABLE:
        if (compiled or not compiled_only) and accepts(queries, keys, values, positions):
            return compute(queries, keys, values, positions)
    return of_seen_slots(definition)(queries, keys, values, positions)


def of_seen_slots(kernel: Attend) -> Attend:
    """The kernel, on keys and values cast to the queries' dtype, with zeros in the slots that no query sees.

    A kernel may multiply a masked slot by 0. If that slot held a NaN, the product would be NaN.
    """
    def attend(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> Tensor:
        if positions is not None:
            keys, values = visible(keys, positions), visible(values, positions)
        keys, values = (tree.map(lambda leaf: leaf.to(queries.dtype), part) for part in (keys, values))
        return kernel(queries, keys, values, positions)

    return attend


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

    Positions must be consecutive. Torch's kernel computes masked scores, too; with blocks, most are never computed.
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


@typed
def by_triton(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
              positions: Int[Tensor, "*b t"]) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for one query a row on a GPU, by a kernel of `ops/gpu/attend.py`."""
    from llama_fn.ops.gpu import attend as gpu_attention  # noqa: F401  it imports triton, and defines the operator

    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    heads = queries.reshape(-1, *queries.shape[-4:-2], queries.shape[-1])
    return torch.ops.llama_fn.attention(heads, keys, values, positions.reshape(-1)).reshape(queries.shape)


@typed
def by_cpp(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
           positions: Int[Tensor, "*b t"]) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for one query a row on the CPU, by a kernel in C++ (see `ops/cpu`)."""
    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    heads = queries.reshape(-1, *queries.shape[-4:-2], queries.shape[-1]).float()
    return avx2.one_query(heads, keys, values, positions.reshape(-1)).to(queries.dtype).reshape(queries.shape)


@typed
def many_by_cpp(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"],
                values: Float[Tensor, "*b k s h"],
                positions: Int[Tensor, "*b t"] | None) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for any queries on the CPU, by a kernel in C++.

    It holds no "t s" matrix of scores and skips masked slots.
    """
    *batch, k, g, t, h = queries.shape
    if positions is None:
        positions = torch.arange(t, device=queries.device).expand(*batch, t)
    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    heads = avx2.many_queries(queries.reshape(-1, k, g, t, h), keys, values, positions.reshape(-1, t))
    return heads.reshape(queries.shape)


def _one(queries: Tensor, positions: Tensor | None) -> bool:
    """Whether there is one query a row, and a cache."""
    return positions is not None and queries.shape[-2] == 1


def _needs_definition(keys: Tensor | Forked) -> bool:
    """Whether only the definition will do: for a forked cache, in forward mode, and for second derivatives.

    Torch's kernel has a second derivative, too, but is 3 to 15 % slower: it recomputes what it did not keep.
    """
    return isinstance(keys, Forked) or forward_mode() or twice()


def _values_by_layers(queries: Tensor, keys: Tensor | Forked) -> bool:
    """Whether `jit_layers` traces, without derivatives or transforms: this package's kernels support neither."""
    return by_layers() and not queries.requires_grad and not transforms() and not _needs_definition(keys)


def _for_triton(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return (queries.is_cuda and _one(queries, positions) and queries.dtype != torch.float64
            and _values_by_layers(queries, keys))


def _for_cpp(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return (_values_by_layers(queries, keys) and queries.dtype in avx2.FLOATS
            and isinstance(keys, Tensor) and isinstance(values, Tensor) and avx2.attends(queries, keys, values))


def _for_cpp_one(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return _one(queries, positions) and _for_cpp(queries, keys, values, positions)


def _for_one_query(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return _one(queries, positions) and not _needs_definition(keys)


def _for_blocks(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    """For 256 tokens, blocks take 0.8 of the time of one call; for 512 tokens, 0.75, and 0.5 with AVX2."""
    return (queries.device.type == "cpu" and queries.shape[-2] > BLOCK and eager() and not transforms()
            and not _needs_definition(keys)
            and not any(isinstance(x, Tensor) and x.requires_grad for x in (queries, keys, values)))


def _for_fused(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return not _needs_definition(keys)


TABLE = (
    Implementation(by_triton, _for_triton, compiled=True),
    Implementation(by_cpp, _for_cpp_one, compiled=True),
    Implementation(many_by_cpp, _for_cpp, compiled=True),
    Implementation(of_seen_slots(one_query), _for_one_query, compiled=True),
    Implementation(of_seen_slots(in_blocks), _for_blocks),
    Implementation(of_seen_slots(fused), _for_fused),
)
