"""One row times matrices on a GPU, at the memory's speed, and what is done with the result: by itself, a gate or a sum
is a small kernel of 2 us, in which no weight is read.

Weights are older than the step, so that their loads begin before the kernel before has ended, and the last programs ask
for the first of the next. Sizes of blocks are the fastest of some ten that were measured (H100).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.ops.gpu import launch as gpu
from llama_fn.ops.gpu.launch import ask, mine, silu
from llama_fn.ops.operators import define

ASKED = 4096  # bytes of the next weights that a program asks for


class Turned(NamedTuple):
    """What becomes of queries, keys and values: queries and keys are turned by the angles of `rope.Rotation`, "b p";
    keys and values go to the slots `positions` of leaves "b k s h".
    """

    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor


def row(weights: list[Tensor], scales: list[Tensor], x: Tensor, residual: Tensor | None = None, gated: bool = False,
        turned: Turned | None = None, following: Tensor | None = None) -> Tensor:
    """W x of a row "1 d", of up to `gpu.MOST` weights "o d" of one dtype, times their outputs' scales if there are any:
    the outputs of all weights side by side, "1 o". With a `residual` "1 o", residual + W x; or, `gated`, of two weights
    silu(W0 x) * W1 x; or, `turned`, of three weights the queries alone. `following` is the weight that will be read
    next.
    """
    y, at_once = x.new_empty((1, len(weights[0]) if gated or turned else sum(map(len, weights)))), ways(weights, x)
    weights, x, ahead = words(weights, x)
    outputs, d = [len(weight) for weight in weights], weights[0].shape[1]
    count, block, warps = (2 if d % 512 == 0 else 4, 256, 4) if at_once > 1 else (
        (2, 2048, 8) if gated or turned or d % 2048 == 0 else (1, 4096, 4))
    programs = triton.cdiv(outputs[0], count // 2) if gated else sum(triton.cdiv(o, count) for o in outputs)
    asking = 0
    if ahead and following is not None and following.data_ptr() % 16 == 0:
        asking = min(1024, programs // 4, following.nbytes // ASKED)
    places, (slots, h) = turned or [x] * len(Turned._fields), turned.keys.shape[-2:] if turned else (1, 1)
    _row[programs,](
        *gpu.filled(weights), *gpu.filled(scales or [x]), *outputs, *[0] * (gpu.MOST - len(outputs)), x,
        x if residual is None else residual.contiguous(), *places, slots, following if asking else x, y,
        ZERO, d, at_once, count, block, h, bool(scales), residual is not None, gated, turned is not None, asking, ASKED,
        ahead, num_warps=warps, **gpu.launch(ahead))
    return y


def empty_row(weights: list[Tensor], scales: list[Tensor], x: Tensor) -> Tensor:
    """Where it goes."""
    return x.new_empty((1, sum(map(len, weights))))


def ways(weights: list[Tensor], x: Tensor) -> int:
    """How many numbers are read at once: four bytes as a word, and the inputs that they meet as another."""
    return 4 if weights[0].dtype == torch.int8 and x.itemsize == 2 and x.shape[-1] % 4 == 0 else 1


def words(weights: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor, bool]:
    """The weights as what is read at once and the rows as they can be, and whether a kernel may begin `early`. Weights
    must be older than the step, and in one piece.
    """
    ahead, x = gpu.early(x), aligned(x.contiguous())
    if any(weight.data_ptr() % 16 for weight in weights):  # it begins where no word does
        weights, ahead = [weight.clone() for weight in weights], False
    return [weight.view(torch.int32) if ways(weights, x) > 1 else weight for weight in weights], x, ahead


def aligned(x: Tensor) -> Tensor:
    """With its first number where words begin."""
    return x.clone() if x.data_ptr() % 16 else x


@triton.jit
def number(fours, i: tl.constexpr, dtype: tl.constexpr):
    """Number i of each four of 16 bits."""
    return (fours >> 16 * i).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _lying(words, i: tl.constexpr, zero):
    """Byte i of each word as a float, as it lies there: the odd bytes 256**i times. The highest can be converted. The
    others become the last bits of 2**23 + 128, which is taken off again; `zero`, that float's bits, would take one
    operation more if the compiler knew them.
    """
    if i == 3:
        lies = (words & -16777216).to(tl.float32)
    elif i == 1:
        lies = ((words & 65280) ^ (zero + 32640)).to(tl.float32, bitcast=True) - 8421376.0
    else:
        lies = ((words >> 8 * i & 255) ^ zero).to(tl.float32, bitcast=True) - 8388736.0
    return lies


ZERO = 0x4B000080  # 2**23 + 128, the float that `_lying` makes of a byte of 0


@triton.jit
def _place(i: tl.constexpr):
    """What makes good how many times byte i counts in `_lying`."""
    return 5.9604644775390625e-08 if i == 3 else 0.00390625 if i == 1 else 1.0


@triton.jit
def _row(w0, w1, w2, s0, s1, s2, o0, o1, o2, x, residual, cos, sin, keys, values, position, slots, following, y, zero,
         d: tl.constexpr, ways: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, h: tl.constexpr,
         SCALED: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr, TURNED: tl.constexpr, ASKING: tl.constexpr,
         ASKED: tl.constexpr, EARLY: tl.constexpr):
    k = tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.dtype.element_ty
    if GATED:  # an output of the first weight, the same of the second, the next of the first
        o, outputs, first = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS) // 2, o0, 0
        second = tl.arange(0, OUTPUTS) % 2 == 1
        at, scale = tl.where(second[:, None], w1, w0), tl.where(second, s1, s0)
    else:
        at, scale, outputs, o, first = mine(w0, w1, w2, s0, s1, s2, o0, o1, o2, OUTPUTS)
    at += o[:, None].to(tl.int64) * d + k[None, :]
    there = (o < outputs)[:, None]
    if ways == 4:
        at = tl.max_contiguous(at, [1, 2])  # two words a thread, as many as it reads fours of inputs
    words = tl.load(at, mask=there & (k < d)[None, :], other=0, eviction_policy="evict_first")
    if SCALED:
        factors = tl.load(scale + o, mask=o < outputs, other=0)
    if EARLY:
        gdc_wait()  # for x; the weight is older
    if ADDED:
        before = tl.load(residual + o, mask=o < outputs, other=0).to(tl.float32)
    if TURNED:
        angle, slot = o % h // 2, tl.load(position).to(tl.int64)
        cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
    total = tl.zeros([OUTPUTS, BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        next_words, inside = words, start + k < d
        if start + BLOCK < d:
            beyond = at + start + BLOCK
            if ways == 4:
                beyond = tl.max_contiguous(beyond, [1, 2])
            next_words = tl.load(beyond, mask=there & (start + BLOCK + k < d)[None, :], other=0,
                                 eviction_policy="evict_first")
        if ways == 1:
            inputs = tl.load(x + start + k, mask=inside, other=0).to(tl.float32)
            total += words.to(tl.float32) * inputs[None, :]
        else:
            fours = tl.load(x.to(tl.pointer_type(tl.int64)) + start + k, mask=inside, other=0)
            for i in tl.static_range(4):
                inputs = number(fours, i, dtype).to(tl.float32) * _place(i)
                total += _lying(words, i, zero) * inputs[None, :]
        words = next_words
    if ASKING > 0:
        last = tl.program_id(0) - (tl.num_programs(0) - ASKING)
        if last >= 0:
            ask(following.to(tl.pointer_type(tl.int8)) + last.to(tl.int64) * ASKED, ASKED)
    if EARLY:
        gdc_launch_dependents()
    out = tl.sum(total, 1)
    if SCALED:
        out *= factors
    out = out.to(dtype)  # as it is where this is a kernel by itself
    if GATED:
        o = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        gate, up = tl.split(tl.reshape(out.to(tl.float32), [OUTPUTS // 2, 2]))
        out = silu(gate, dtype) * up
    if ADDED:
        out = before + out.to(tl.float32)
    place, kept = first + o.to(tl.int64), o < outputs
    if TURNED:
        even, odd = tl.split(tl.reshape(out.to(tl.float32), [OUTPUTS // 2, 2]))
        cosine, _ = tl.split(tl.reshape(cosine, [OUTPUTS // 2, 2]))
        sine, _ = tl.split(tl.reshape(sine, [OUTPUTS // 2, 2]))
        if first <= o0:  # a query or a key
            even, odd = even * cosine - odd * sine, even * sine + odd * cosine
        out = tl.reshape(tl.join(even, odd), [OUTPUTS])
        if first > 0:  # a key or a value
            y, place, kept = keys, (o // h * slots + slot) * h + o % h, kept & (slot < slots)
            if first > o0:
                y = values
    tl.store(y + place, out.to(dtype), mask=kept)


define("row(Tensor[] weights, Tensor[] scales, Tensor x) -> Tensor", empty_row, CUDA=row)
