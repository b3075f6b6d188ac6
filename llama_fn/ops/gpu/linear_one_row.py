"""One row times matrices on a GPU, at the memory's speed, with its epilogue: a rotation, a gate or a residual sum.

An epilogue in a kernel of its own takes 2 us, in which no weight is read. Weights do not change during a step, so their
loads begin before the previous kernel has ended, and the last programs prefetch the first weights of the next kernel.
Block sizes are the fastest of some ten measured (H100).
"""

# The checker takes a Triton kernel's body and its launch `kernel[grid](...)` for plain Python.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.ops.gpu import launch as gpu
from llama_fn.ops.gpu.launch import prefetch, program_outputs, silu
from llama_fn.ops.operators import define

PREFETCH_BYTES = 4096  # bytes of the next weight that one program prefetches


class Rotated(NamedTuple):
    """The epilogue of queries, keys and values.

    Queries and keys are rotated by the angles whose cosines and sines "b p" these are. Keys and values are written to
    the slots `positions` "b" of the cache's leaves "b k s h".
    """

    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor


def row(weights: list[Tensor], scales: list[Tensor], x: Tensor, residual: Tensor | None = None, gated: bool = False,
        rotated: Rotated | None = None, next_weights: Tensor | None = None) -> Tensor:
    """W x of one row "1 d" and up to `gpu.MAX_WEIGHTS` weights "o d" of one dtype: all outputs side by side, "1 o".

    Outputs are multiplied by their scales, if there are any. At most one epilogue follows: with `residual` "1 o" the
    result is residual + W x; with `gated`, silu(W0 x) * W1 x of two weights; with `rotated`, the queries alone, while
    keys and values go to the cache. `next_weights` is the weight that the next kernel reads; it is prefetched.
    """
    y = x.new_empty((1, len(weights[0]) if gated or rotated else sum(map(len, weights))))
    width = vector_width(weights, x)
    weights, x, pdl = as_loaded(weights, x)
    outputs, d = [len(weight) for weight in weights], weights[0].shape[1]
    count, block, warps = (2 if d % 512 == 0 else 4, 256, 4) if width > 1 else (
        (2, 2048, 8) if gated or rotated or d % 2048 == 0 else (1, 4096, 4))
    programs = triton.cdiv(outputs[0], count // 2) if gated else sum(triton.cdiv(o, count) for o in outputs)
    prefetching = 0
    if pdl and next_weights is not None and next_weights.data_ptr() % 16 == 0:
        prefetching = min(1024, programs // 4, next_weights.nbytes // PREFETCH_BYTES)
    rotation, (slots, h) = rotated or [x] * len(Rotated._fields), rotated.keys.shape[-2:] if rotated else (1, 1)
    _one_row[programs,](
        *gpu.padded(weights), *gpu.padded(scales or [x]), *outputs, *[0] * (gpu.MAX_WEIGHTS - len(outputs)), x,
        x if residual is None else residual.contiguous(), *rotation, slots, next_weights if prefetching else x, y,
        ZERO, d, width, count, block, h, bool(scales), residual is not None, gated, rotated is not None, prefetching,
        PREFETCH_BYTES, pdl, num_warps=warps, **gpu.launch(pdl))
    return y


def empty_row(weights: list[Tensor], scales: list[Tensor], x: Tensor) -> Tensor:
    """Memory for the result of `row` without an epilogue."""
    return x.new_empty((1, sum(map(len, weights))))


def vector_width(weights: list[Tensor], x: Tensor) -> int:
    """How many numbers a load reads: one, or four 8-bit weights as a 32-bit word (their inputs are a 64-bit word)."""
    return 4 if weights[0].dtype == torch.int8 and x.itemsize == 2 and x.shape[-1] % 4 == 0 else 1


def as_loaded(weights: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor, bool]:
    """The weights and the row as they are loaded, and whether to use programmatic dependent launch.

    Weights must be contiguous, and written before this step began.
    """
    pdl, x = gpu.has_pdl(x), aligned(x.contiguous())
    if any(weight.data_ptr() % 16 for weight in weights):
        # A load of words needs alignment. The copy is written in this step, so no load may begin before that (PDL).
        weights, pdl = [weight.clone() for weight in weights], False
    return [weight.view(torch.int32) if vector_width(weights, x) > 1 else weight for weight in weights], x, pdl


def aligned(x: Tensor) -> Tensor:
    """The tensor, copied if its memory is not aligned to 16 bytes."""
    return x.clone() if x.data_ptr() % 16 else x


@triton.jit
def unpack(packed, i: tl.constexpr, dtype: tl.constexpr):
    """The i-th of the four 16-bit numbers in each 64-bit word."""
    return (packed >> 16 * i).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _byte_in_place(words, i: tl.constexpr, zero):
    """Signed byte i of each word as a float, times the power of two that its position in the word gives it.

    Byte 3 is masked and converted: 2**24 times its value. Bytes 0 to 2 become the last bits of the float 2**23 + 128,
    which is then subtracted: byte 1 stays in place and counts 256 times. `zero` holds the bits of that float; it is an
    argument, because the compiler spends one more operation on a constant.
    """
    if i == 3:
        number = (words & -16777216).to(tl.float32)
    elif i == 1:
        number = ((words & 65280) ^ (zero + 32640)).to(tl.float32, bitcast=True) - 8421376.0
    else:
        number = ((words >> 8 * i & 255) ^ zero).to(tl.float32, bitcast=True) - 8388736.0
    return number


ZERO = 0x4B000080  # 2**23 + 128, the float that `_byte_in_place` makes of a byte of 0


@triton.jit
def _byte_scale(i: tl.constexpr):
    """The inverse of the power of two that byte i has in `_byte_in_place`."""
    return 5.9604644775390625e-08 if i == 3 else 0.00390625 if i == 1 else 1.0


@triton.jit
def _one_row(w0, w1, w2, s0, s1, s2, o0, o1, o2, x, residual, cos, sin, keys, values, position, slots, next_weights, y,
             zero, d: tl.constexpr, vector_width: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
             h: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr, ROTATED: tl.constexpr,
             PREFETCHING: tl.constexpr, PREFETCH_BYTES: tl.constexpr, PDL: tl.constexpr):
    # w, s, o: weights, scales, numbers of outputs (`launch.py`). cos to position: see `Rotated`. slots: of the cache.
    # next_weights: the last PREFETCHING programs prefetch it, PREFETCH_BYTES each. zero: see `_byte_in_place`.
    # A program computes OUTPUTS outputs, BLOCK loads at a time. ADDED, GATED, ROTATED: the epilogue.
    k = tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.dtype.element_ty
    if GATED:  # outputs of the two weights alternate, so that a program has both
        o, outputs, first = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS) // 2, o0, 0
        second = tl.arange(0, OUTPUTS) % 2 == 1
        at, scale = tl.where(second[:, None], w1, w0), tl.where(second, s1, s0)
    else:
        at, scale, outputs, o, first = program_outputs(w0, w1, w2, s0, s1, s2, o0, o1, o2, OUTPUTS)
    at += o[:, None].to(tl.int64) * d + k[None, :]
    mask = (o < outputs)[:, None]
    if vector_width == 4:
        at = tl.max_contiguous(at, [1, 2])  # each thread loads two words, as it does of the inputs
    words = tl.load(at, mask=mask & (k < d)[None, :], other=0, eviction_policy="evict_first")
    if SCALED:
        factors = tl.load(scale + o, mask=o < outputs, other=0)
    if PDL:
        gdc_wait()  # for x; the weight is older
    if ADDED:
        skipped = tl.load(residual + o, mask=o < outputs, other=0).to(tl.float32)
    if ROTATED:
        angle, slot = o % h // 2, tl.load(position).to(tl.int64)
        cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
    total = tl.zeros([OUTPUTS, BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        next_words, inside = words, start + k < d
        if start + BLOCK < d:
            next_at = at + start + BLOCK
            if vector_width == 4:
                next_at = tl.max_contiguous(next_at, [1, 2])
            next_words = tl.load(next_at, mask=mask & (start + BLOCK + k < d)[None, :], other=0,
                                 eviction_policy="evict_first")
        if vector_width == 1:
            inputs = tl.load(x + start + k, mask=inside, other=0).to(tl.float32)
            total += words.to(tl.float32) * inputs[None, :]
        else:
            packed = tl.load(x.to(tl.pointer_type(tl.int64)) + start + k, mask=inside, other=0)
            for i in tl.static_range(4):
                inputs = unpack(packed, i, dtype).to(tl.float32) * _byte_scale(i)
                total += _byte_in_place(words, i, zero) * inputs[None, :]
        words = next_words
    if PREFETCHING > 0:
        last = tl.program_id(0) - (tl.num_programs(0) - PREFETCHING)
        if last >= 0:
            prefetch(next_weights.to(tl.pointer_type(tl.int8)) + last.to(tl.int64) * PREFETCH_BYTES, PREFETCH_BYTES)
    if PDL:
        gdc_launch_dependents()
    out = tl.sum(total, 1)
    if SCALED:
        out *= factors
    out = out.to(dtype)  # rounded as a product without an epilogue
    if GATED:
        o = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        gate, up = tl.split(tl.reshape(out.to(tl.float32), [OUTPUTS // 2, 2]))
        out = silu(gate, dtype) * up
    if ADDED:
        out = skipped + out.to(tl.float32)
    place, store_mask = first + o.to(tl.int64), o < outputs
    if ROTATED:
        even, odd = tl.split(tl.reshape(out.to(tl.float32), [OUTPUTS // 2, 2]))
        cosine, _ = tl.split(tl.reshape(cosine, [OUTPUTS // 2, 2]))
        sine, _ = tl.split(tl.reshape(sine, [OUTPUTS // 2, 2]))
        if first <= o0:  # a query or a key
            even, odd = even * cosine - odd * sine, even * sine + odd * cosine
        out = tl.reshape(tl.join(even, odd), [OUTPUTS])
        if first > 0:  # a key or a value
            y, place, store_mask = keys, (o // h * slots + slot) * h + o % h, store_mask & (slot < slots)
            if first > o0:
                y = values
    tl.store(y + place, out.to(dtype), mask=store_mask)


define("linear_one_row(Tensor[] weights, Tensor[] scales, Tensor x) -> Tensor", empty_row, CUDA=row)
