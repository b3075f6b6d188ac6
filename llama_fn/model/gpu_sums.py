"""Few rows times matrices on a GPU, which torch has no kernel for that reads them, bytes too, at the memory's speed.

A row's weights are older than the step, so that their loads begin before the kernel before has ended: what the small
kernels between take is hidden by that. Sizes of blocks are the fastest of some ten that were measured (H100, H200).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.model.gpu import early, launch
from llama_fn.model.operators import define

MOST = 3  # weights that one kernel takes


def sums(weights: list[Tensor], x: Tensor, share: int) -> Tensor:
    """Products summed in float32, of up to `MOST` weights "o d" of one dtype and rows "b d": "p b o", the outputs of
    all weights side by side. The sum over p is missing: of several rows, a program sums a `share` of the inputs.
    Weights must be older than the step, and in one piece.
    """
    ways, ahead, x = _ways(weights, x), early(x), x.contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    if any(weight.data_ptr() % 16 for weight in weights):  # it begins where no word does
        weights, ahead = [weight.clone() for weight in weights], False
    words = [weight.view(torch.int32) if ways > 1 else weight for weight in weights]
    words += words[-1:] * (MOST - len(words))
    outputs = [len(weight) for weight in weights] + [0] * (MOST - len(weights))
    y, (rows, d) = empty_sums(weights, x, share), (len(x), words[0].shape[1])
    if rows == 1:
        count, block, warps = (2, 256, 4) if ways > 1 else (2, 2048, 8) if d % 2048 == 0 else (1, 4096, 4)
        _one_row[sum(triton.cdiv(o, count) for o in outputs),](
            *words, *outputs, x, y, ZERO, d, ways, count, block, ahead, num_warps=warps, **launch(ahead))
    else:
        count, block = _block_of(rows, ways)
        _few_rows[sum(triton.cdiv(o, count) for o in outputs), len(y)](
            *words, *outputs, x, y, rows, d, share // ways, ways, max(16, triton.next_power_of_2(rows)), count,
            block, 4, ahead, num_warps=4, **launch(ahead))
    return y


def empty_sums(weights: list[Tensor], x: Tensor, share: int) -> Tensor:
    """Where `sums` go."""
    rows, d = x.shape
    return x.new_empty((triton.cdiv(d, share), rows, sum(len(weight) for weight in weights)), dtype=torch.float32)


def share(weights: list[Tensor], x: Tensor) -> int:
    """How many of the inputs, in whole blocks, a program should sum, so that there are some hundred programs. (It is an
    argument of `sums` so that it stands in a compiled graph: torch's cache between processes does not look at sizes
    within one.)
    """
    rows, d, ways = *x.shape, _ways(weights, x)
    count, block = _block_of(rows, ways)
    programs = 256 if ways == 1 or rows > 16 else 512
    parts = 1 if rows == 1 else max(1, round(programs * count / sum(len(weight) for weight in weights)))
    return triton.cdiv(triton.cdiv(d, parts), ways * block) * ways * block


def _ways(weights: list[Tensor], x: Tensor) -> int:
    """How many numbers are read at once: four bytes as a word, and the inputs that they meet as another."""
    return 4 if weights[0].dtype == torch.int8 and x.itemsize == 2 and x.shape[-1] % 4 == 0 else 1


def _block_of(rows: int, ways: int) -> tuple[int, int]:
    """Of several rows, the outputs and the inputs (in words) that a program multiplies at once."""
    return (64 if rows <= 16 else 128), (128 if ways == 1 else 32)


@triton.jit
def _mine(w0, w1, w2, o0, o1, o2, OUTPUTS: tl.constexpr):
    """Of this program: its weight, how many outputs that has, which of them are its own, and where they go."""
    program, weight, outputs, first = tl.program_id(0), w0, o0, 0
    if program >= tl.cdiv(o0, OUTPUTS):
        program, weight, outputs, first = program - tl.cdiv(o0, OUTPUTS), w1, o1, o0
        if program >= tl.cdiv(o1, OUTPUTS):
            program, weight, outputs, first = program - tl.cdiv(o1, OUTPUTS), w2, o2, o0 + o1
    return weight, outputs, program * OUTPUTS + tl.arange(0, OUTPUTS), first


@triton.jit
def _byte(words, i: tl.constexpr):
    """Byte i of each word as a float: as the last bits of 2**23 + 128, which is taken off again. (To convert a byte
    takes four times as long.)
    """
    return (((words ^ -2139062144) >> 8 * i) & 255 | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _lying(words, i: tl.constexpr, zero):
    """The same in fewer operations, the odd bytes 256**i times, as they lie there. The highest can be converted. With
    the others goes `zero`, a float's bits, which would take one operation more if the compiler knew them. (5 % of the
    time of one row; several rows, whose numbers are made 16 bits again, are slower with it.)
    """
    if i == 3:
        number = (words & -16777216).to(tl.float32)
    elif i == 1:
        number = ((words & 65280) ^ (zero + 32640)).to(tl.float32, bitcast=True) - 8421376.0
    else:
        number = ((words >> 8 * i & 255) ^ zero).to(tl.float32, bitcast=True) - 8388736.0
    return number


ZERO = 0x4B000080  # 2**23 + 128, the float that `_lying` makes of a byte of 0


@triton.jit
def _place(i: tl.constexpr):
    """What makes good how many times byte i counts in `_lying`."""
    return 5.9604644775390625e-08 if i == 3 else 0.00390625 if i == 1 else 1.0


@triton.jit
def _number(fours, i: tl.constexpr, dtype: tl.constexpr):
    """Number i of each four of 16 bits."""
    return (fours >> 16 * i).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _one_row(w0, w1, w2, o0, o1, o2, x, y, zero, d: tl.constexpr, ways: tl.constexpr, OUTPUTS: tl.constexpr,
             BLOCK: tl.constexpr, EARLY: tl.constexpr):
    weight, outputs, o, first = _mine(w0, w1, w2, o0, o1, o2, OUTPUTS)
    k, there = tl.arange(0, BLOCK), (o < outputs)[:, None]
    at = weight + o[:, None].to(tl.int64) * d + k[None, :]
    if ways == 4:
        at = tl.max_contiguous(at, [1, 2])  # two words a thread, as many as it reads fours of inputs
    words = tl.load(at, mask=there & (k < d)[None, :], other=0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()  # for x; the weight is older
    total = tl.zeros([OUTPUTS, BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        following, inside = words, start + k < d
        if start + BLOCK < d:
            beyond = at + start + BLOCK
            if ways == 4:
                beyond = tl.max_contiguous(beyond, [1, 2])
            following = tl.load(beyond, mask=there & (start + BLOCK + k < d)[None, :], other=0,
                                eviction_policy="evict_first")
        if ways == 1:
            total += words.to(tl.float32) * tl.load(x + start + k, mask=inside, other=0).to(tl.float32)[None, :]
        else:
            fours = tl.load(x.to(tl.pointer_type(tl.int64)) + start + k, mask=inside, other=0)
            for i in tl.static_range(4):
                row = _number(fours, i, x.dtype.element_ty).to(tl.float32) * _place(i)
                total += _lying(words, i, zero) * row[None, :]
        words = following
    if EARLY:
        gdc_launch_dependents()
    tl.store(y + first + o, tl.sum(total, 1), mask=o < outputs)


@triton.jit
def _few_rows(w0, w1, w2, o0, o1, o2, x, y, rows, d: tl.constexpr, share: tl.constexpr, ways: tl.constexpr,
              ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
              EARLY: tl.constexpr):
    weight, outputs, o, first = _mine(w0, w1, w2, o0, o1, o2, OUTPUTS)
    r, k, begin = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.program_id(1) * share
    at = weight + o[:, None].to(tl.int64) * d + begin
    if EARLY:
        gdc_wait()
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in tl.range(0, share, BLOCK, num_stages=STAGES):
        inside = begin + start + k < d
        words = tl.load(at + start + k[None, :], mask=(o < outputs)[:, None] & inside[None, :], other=0)
        place, there = r[None, :] * d + begin + start + k[:, None], (r < rows)[None, :] & inside[:, None]
        if ways == 1:
            row = tl.load(x + place, mask=there, other=0)
            total = tl.dot(words.to(row.dtype), row, total)
        else:
            fours = tl.load(x.to(tl.pointer_type(tl.int64)) + place, mask=there, other=0)
            for i in tl.static_range(4):
                row = _number(fours, i, x.dtype.element_ty)
                total = tl.dot(_byte(words, i).to(row.dtype), row, total)
    if EARLY:
        gdc_launch_dependents()
    place = (tl.program_id(1).to(tl.int64) * rows + r[None, :]) * (o0 + o1 + o2) + first + o[:, None]
    tl.store(y + place, total, mask=(r < rows)[None, :] & (o < outputs)[:, None])


define("sums(Tensor[] weights, Tensor x, int share) -> Tensor", empty_sums, CUDA=sums)
