"""What comes after a product on a GPU. The product of one row does it by itself (`linear_one_row.py`). After that of
several rows these kernels do it, and add up the parts of its sums (`linear_few_rows.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.ops.gpu import launch as gpu
from llama_fn.ops.gpu.launch import silu
from llama_fn.ops.gpu.linear_few_rows import Weights, gated_sums, share, summed, sums_of
from llama_fn.ops.gpu.linear_one_row import Turned, row


def turned(weights: Weights, x: Tensor, places: Turned, following: Weights | None) -> Tensor:
    """Queries "b o", turned, of the rows "b d"; keys, turned, and values are written to their `places`."""
    if len(x) == 1:
        return row(*weights, x, turned=places, following=_first(following))
    queries, (parts, told) = x.new_empty((len(x), len(weights.values[0]))), sums_of(weights, x)
    _turn[len(x), triton.cdiv(parts.shape[2], 512)](
        *told, queries, *places, *places.keys.shape[1:], len(parts), 512, bool(weights.scales), gpu.early(x),
        num_warps=4, **gpu.launch(gpu.early(x)))
    return queries


def gated(weights: Weights, x: Tensor, following: Weights | None) -> Tensor:
    """silu(W0 x) * W1 x."""
    if len(x) == 1:
        return row(*weights, x, gated=True, following=_first(following))
    if share(weights.values, x) >= x.shape[1]:
        return gated_sums(weights, x)
    y, (parts, told) = x.new_empty((len(x), len(weights.values[0]))), sums_of(weights, x)
    _gate[len(x), triton.cdiv(y.shape[1], 512)](*told, y, len(parts), 512, bool(weights.scales), gpu.early(x),
                                                num_warps=4, **gpu.launch(gpu.early(x)))
    return y


def added(weights: Weights, x: Tensor, residual: Tensor, norm: Tensor | None, eps: float,
          following: Weights | None) -> tuple[Tensor, Tensor]:
    """residual + W x, and of that the `normed`, if there is a norm."""
    if len(x) == 1:
        y = row(*weights, x, residual=residual, following=_first(following))
        return y, y if norm is None else normed(norm, y, eps)
    y, (parts, told) = torch.empty_like(residual), sums_of(weights, x)
    after, block = torch.empty_like(y), triton.next_power_of_2(y.shape[1])
    _add[len(x),](*told, residual, y, y if norm is None else norm, after, eps, len(parts), block,
                  bool(weights.scales), norm is not None, gpu.early(x), num_warps=max(1, min(16, block // 256)),
                  **gpu.launch(gpu.early(x)))
    return y, after


def normed(norm: Tensor, x: Tensor, eps: float) -> Tensor:
    """`norm.rms_norm` of rows "b d"."""
    y, (rows, d), ahead = torch.empty_like(x), x.shape, gpu.early(x)
    block = triton.next_power_of_2(d)
    _norm[rows,](x, norm, y, d, eps, block, ahead, num_warps=max(1, min(16, block // 256)), **gpu.launch(ahead))
    return y


def _first(following: Weights | None) -> Tensor | None:
    """The weight that will be read next."""
    return None if following is None else following.values[0]


@triton.jit
def _turn(parts, s0, s1, s2, o0, o1, o2, queries, cos, sin, keys, values, positions, k, slots, h, P: tl.constexpr,
          BLOCK: tl.constexpr, SCALED: tl.constexpr, EARLY: tl.constexpr):
    row, rows, o = tl.program_id(0), tl.num_programs(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = queries.dtype.element_ty
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    out = summed(parts, s0, s1, s2, o0, o1, o2, row, rows, o, o < o0 + o1 + o2, dtype, P, SCALED)
    even, odd = tl.split(tl.reshape(out, [BLOCK // 2, 2]))
    pair = tl.program_id(1) * BLOCK + 2 * tl.arange(0, BLOCK // 2)
    angle = row * (h // 2) + pair % h // 2
    cosine = tl.load(cos + angle, mask=pair < o0 + o1, other=1)
    sine = tl.load(sin + angle, mask=pair < o0 + o1, other=0)
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [BLOCK])
    out = tl.where(o < o0 + o1, turned, out)
    slot, own = tl.load(positions + row).to(tl.int64), tl.where(o < o0 + o1, o - o0, o - o0 - o1)
    kept = ((row * k + own // h) * slots + slot) * h + own % h
    place = tl.where(o < o0, queries + row * o0 + o, tl.where(o < o0 + o1, keys, values) + kept)
    tl.store(place, out.to(dtype), mask=(o < o0) | (o < o0 + o1 + o2) & (slot < slots))


@triton.jit
def _gate(parts, s0, s1, s2, o0, o1, o2, y, P: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
          EARLY: tl.constexpr):
    row, rows, o = tl.program_id(0), tl.num_programs(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.dtype.element_ty
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    gate = summed(parts, s0, s1, s2, o0, o1, o2, row, rows, o, o < o0, dtype, P, SCALED)
    up = summed(parts, s0, s1, s2, o0, o1, o2, row, rows, o0 + o, o < o0, dtype, P, SCALED)
    tl.store(y + row * o0 + o, silu(gate, dtype) * up, mask=o < o0)


@triton.jit
def _add(parts, s0, s1, s2, o0, o1, o2, residual, y, norm, after, eps, P: tl.constexpr, BLOCK: tl.constexpr,
         SCALED: tl.constexpr, NORMED: tl.constexpr, EARLY: tl.constexpr):
    row, rows, o = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.dtype.element_ty
    if NORMED:
        factors = tl.load(norm + o, mask=o < o0, other=0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    before = tl.load(residual + row * o0 + o, mask=o < o0, other=0).to(tl.float32)
    out = (before + summed(parts, s0, s1, s2, o0, o1, o2, row, rows, o, o < o0, dtype, P, SCALED)).to(dtype)
    tl.store(y + row * o0 + o, out, mask=o < o0)
    if NORMED:
        tl.store(after + row * o0 + o, _normalized(out, factors, o0, eps), mask=o < o0)


@triton.jit
def _norm(x, norm, y, d, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    k, row = tl.arange(0, BLOCK), tl.program_id(0)
    factors = tl.load(norm + k, mask=k < d, other=0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    numbers = tl.load(x + row * d + k, mask=k < d, other=0)
    tl.store(y + row * d + k, _normalized(numbers, factors, d, eps), mask=k < d)


@triton.jit
def _normalized(x, factors, d, eps):
    wide = x.to(tl.float32)
    quotient = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / d + eps)).to(x.dtype)
    return (quotient.to(tl.float32) * factors).to(x.dtype)
