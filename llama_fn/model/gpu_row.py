"""One row times matrices on a GPU, at the memory's speed, and what is done with the result: by itself, a gate or a sum
is a small kernel of 2 us, in which no weight is read.

Weights are older than the step, so that their loads begin before the kernel before has ended, and the last programs ask
for the first of the next. Sizes of blocks are the fastest of some ten that were measured (H100).
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.model import gpu
from llama_fn.model.gpu import mine, number
from llama_fn.model.operators import define

ASKED = 4096  # bytes of the next weights that a program asks for


def row(weights: list[Tensor], scales: list[Tensor], x: Tensor, residual: Tensor | None = None, gated: bool = False,
        following: Tensor | None = None) -> Tensor:
    """W x of a row "1 d", of up to `gpu.MOST` weights "o d" of one dtype, times their outputs' scales if there are any:
    the outputs of all weights side by side, "1 o". With a `residual` "1 o", residual + W x; or, `gated`, of two weights
    silu(W0 x) * W1 x. `following` is the weight that will be read next.
    """
    y, ways = empty_row(weights, scales, x, residual, gated), gpu.ways(weights, x)
    weights, x, ahead = gpu.words(weights, x)
    outputs, d = [len(weight) for weight in weights], weights[0].shape[1]
    count, block, warps = (2 if d % 512 == 0 else 4, 256, 4) if ways > 1 else (
        (2, 2048, 8) if gated or d % 2048 == 0 else (1, 4096, 4))
    programs = triton.cdiv(outputs[0], count // 2) if gated else sum(triton.cdiv(o, count) for o in outputs)
    asking = 0
    if ahead and following is not None and following.data_ptr() % 16 == 0:
        asking = min(1024, programs // 4, following.nbytes // ASKED)
    _row[programs,](
        *gpu.filled(weights), *gpu.filled(scales or [x]), *outputs, *[0] * (gpu.MOST - len(outputs)), x,
        x if residual is None else residual.contiguous(), following if asking else x, y, ZERO, d, ways, count, block,
        bool(scales), residual is not None, gated, asking, ASKED, ahead, num_warps=warps, **gpu.launch(ahead))
    return y


def empty_row(weights: list[Tensor], scales: list[Tensor], x: Tensor, residual: Tensor | None = None,
              gated: bool = False, following: Tensor | None = None) -> Tensor:
    """Where it goes."""
    return x.new_empty((1, len(weights[0]) if gated else sum(len(weight) for weight in weights)))


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
def _ask(at, size):
    """Have `size` bytes come into the second cache."""
    tl.inline_asm_elementwise("""{
        .reg .pred first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, thread;
        }""", "=r,l,r", [at.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _row(w0, w1, w2, s0, s1, s2, o0, o1, o2, x, residual, following, y, zero, d: tl.constexpr, ways: tl.constexpr,
         OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr,
         ASKING: tl.constexpr, ASKED: tl.constexpr, EARLY: tl.constexpr):
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
            _ask(following.to(tl.pointer_type(tl.int8)) + last.to(tl.int64) * ASKED, last * 0 + ASKED)
    if EARLY:
        gdc_launch_dependents()
    out = tl.sum(total, 1)
    if SCALED:
        out *= factors
    out = out.to(dtype)  # as it is where this is a kernel by itself
    if GATED:
        o = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        gate, up = tl.split(tl.reshape(out.to(tl.float32), [OUTPUTS // 2, 2]))
        out = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    if ADDED:
        out = before + out.to(tl.float32)
    tl.store(y + first + o, out.to(dtype), mask=o < outputs)


define("row(Tensor[] weights, Tensor[] scales, Tensor x, Tensor? residual=None, bool gated=False, "
       "Tensor? following=None) -> Tensor", empty_row, CUDA=row)
