"""Epilogues: what follows a matrix product on a GPU, which is a rotation, a gate, or a residual sum and a norm.

The product of one row computes its epilogue in the same kernel (`linear_one_row.py`). For several rows these kernels
add up the split-K parts of the product (`linear_few_rows.py`) and compute the epilogue.
"""

# The checker takes a Triton kernel's body and its launch `kernel[grid](...)` for plain Python.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.ops.gpu import launch as gpu
from llama_fn.ops.gpu.launch import silu
from llama_fn.ops.gpu.linear_few_rows import Weights, gated_product, reduce_split_k, split_k_arguments, split_size
from llama_fn.ops.gpu.linear_one_row import Rotated, row


def rotated(weights: Weights, x: Tensor, rotation: Rotated, next_weights: Weights | None) -> Tensor:
    """The rotated queries "b o" of rows "b d". The rotated keys, and the values, are written to `rotation`."""
    if len(x) == 1:
        return row(*weights, x, rotated=rotation, next_weights=_first(next_weights))
    queries, (parts, arguments) = x.new_empty((len(x), len(weights.values[0]))), split_k_arguments(weights, x)
    _rotate[len(x), triton.cdiv(parts.shape[2], 512)](
        *arguments, queries, *rotation, *rotation.keys.shape[1:], len(parts), 512, bool(weights.scales), gpu.has_pdl(x),
        num_warps=4, **gpu.launch(gpu.has_pdl(x)))
    return queries


def gated(weights: Weights, x: Tensor, next_weights: Weights | None) -> Tensor:
    """The gated product silu(W0 x) * W1 x."""
    if len(x) == 1:
        return row(*weights, x, gated=True, next_weights=_first(next_weights))
    if split_size(weights.values, x) >= x.shape[1]:
        return gated_product(weights, x)
    y, (parts, arguments) = x.new_empty((len(x), len(weights.values[0]))), split_k_arguments(weights, x)
    _gate[len(x), triton.cdiv(y.shape[1], 512)](*arguments, y, len(parts), 512, bool(weights.scales), gpu.has_pdl(x),
                                                num_warps=4, **gpu.launch(gpu.has_pdl(x)))
    return y


def added(weights: Weights, x: Tensor, residual: Tensor, norm: Tensor | None, eps: float,
          next_weights: Weights | None) -> tuple[Tensor, Tensor]:
    """Two results: y = residual + W x, and `normed` of y (y itself if `norm` is None)."""
    if len(x) == 1:
        y = row(*weights, x, residual=residual, next_weights=_first(next_weights))
        return y, y if norm is None else normed(norm, y, eps)
    y, (parts, arguments) = torch.empty_like(residual), split_k_arguments(weights, x)
    normalized, block = torch.empty_like(y), triton.next_power_of_2(y.shape[1])
    _add[len(x),](*arguments, residual, y, y if norm is None else norm, normalized, eps, len(parts), block,
                  bool(weights.scales), norm is not None, gpu.has_pdl(x), num_warps=max(1, min(16, block // 256)),
                  **gpu.launch(gpu.has_pdl(x)))
    return y, normalized


def normed(norm: Tensor, x: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows "b d", rounded as `model/norm.py` rounds."""
    y, (rows, d), pdl = torch.empty_like(x), x.shape, gpu.has_pdl(x)
    block = triton.next_power_of_2(d)
    _norm[rows,](x, norm, y, d, eps, block, pdl, num_warps=max(1, min(16, block // 256)), **gpu.launch(pdl))
    return y


def _first(next_weights: Weights | None) -> Tensor | None:
    """The first weight of the next kernel, to prefetch."""
    return None if next_weights is None else next_weights.values[0]


@triton.jit
def _rotate(parts, s0, s1, s2, o0, o1, o2, queries, cos, sin, keys, values, positions, k, slots, h, P: tl.constexpr,
          BLOCK: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    row, rows, o = tl.program_id(0), tl.num_programs(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = queries.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    out = reduce_split_k(parts, s0, s1, s2, o0, o1, o2, row, rows, o, o < o0 + o1 + o2, dtype, P, SCALED)
    even, odd = tl.split(tl.reshape(out, [BLOCK // 2, 2]))
    pair = tl.program_id(1) * BLOCK + 2 * tl.arange(0, BLOCK // 2)
    angle = row * (h // 2) + pair % h // 2
    cosine = tl.load(cos + angle, mask=pair < o0 + o1, other=1)
    sine = tl.load(sin + angle, mask=pair < o0 + o1, other=0)
    rotated = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [BLOCK])
    out = tl.where(o < o0 + o1, rotated, out)
    slot, own = tl.load(positions + row).to(tl.int64), tl.where(o < o0 + o1, o - o0, o - o0 - o1)
    in_cache = ((row * k + own // h) * slots + slot) * h + own % h
    place = tl.where(o < o0, queries + row * o0 + o, tl.where(o < o0 + o1, keys, values) + in_cache)
    tl.store(place, out.to(dtype), mask=(o < o0) | (o < o0 + o1 + o2) & (slot < slots))


@triton.jit
def _gate(parts, s0, s1, s2, o0, o1, o2, y, P: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
          PDL: tl.constexpr):
    row, rows, o = tl.program_id(0), tl.num_programs(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = reduce_split_k(parts, s0, s1, s2, o0, o1, o2, row, rows, o, o < o0, dtype, P, SCALED)
    up = reduce_split_k(parts, s0, s1, s2, o0, o1, o2, row, rows, o0 + o, o < o0, dtype, P, SCALED)
    tl.store(y + row * o0 + o, silu(gate, dtype) * up, mask=o < o0)


@triton.jit
def _add(parts, s0, s1, s2, o0, o1, o2, residual, y, norm, normalized, eps, P: tl.constexpr, BLOCK: tl.constexpr,
         SCALED: tl.constexpr, NORMED: tl.constexpr, PDL: tl.constexpr):
    row, rows, o = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.dtype.element_ty
    if NORMED:
        factors = tl.load(norm + o, mask=o < o0, other=0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    skipped = tl.load(residual + row * o0 + o, mask=o < o0, other=0).to(tl.float32)
    out = (skipped + reduce_split_k(parts, s0, s1, s2, o0, o1, o2, row, rows, o, o < o0, dtype, P, SCALED)).to(dtype)
    tl.store(y + row * o0 + o, out, mask=o < o0)
    if NORMED:
        tl.store(normalized + row * o0 + o, _normalized(out, factors, o0, eps), mask=o < o0)


@triton.jit
def _norm(x, norm, y, d, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    k, row = tl.arange(0, BLOCK), tl.program_id(0)
    factors = tl.load(norm + k, mask=k < d, other=0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    numbers = tl.load(x + row * d + k, mask=k < d, other=0)
    tl.store(y + row * d + k, _normalized(numbers, factors, d, eps), mask=k < d)


@triton.jit
def _normalized(x, factors, d, eps):
    wide = x.to(tl.float32)
    quotient = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / d + eps)).to(x.dtype)
    return (quotient.to(tl.float32) * factors).to(x.dtype)
