"""Few rows times matrices on a GPU, which torch has no kernel for that reads them, bytes too, at the memory's speed.

A row's weights are older than the step, so that their loads begin before the kernel before has ended: what the small
kernels between take is hidden by that. Sizes of blocks are the fastest of some ten that were measured (H200).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.model.gpu import define, early, launch

MOST = 3  # weights that one kernel takes


def sums(weights: list[Tensor], x: Tensor, share: int) -> Tensor:
    """Products summed in float32, of up to `MOST` weights "o d" of one dtype and the rows "b w d/w" that `ways` has
    laid out: "p b o", the outputs of all weights side by side. The sum over p is missing: of several rows, a program
    sums a `share` of the inputs. Weights must be older than the step, and in one piece.
    """
    rows, ways, d = x.shape
    ahead = early(x)
    if any(weight.data_ptr() % 16 for weight in weights):  # it begins where no word does
        weights, ahead = [weight.clone() for weight in weights], False
    words = [weight.view(torch.int32) if ways > 1 else weight for weight in weights]
    words += words[-1:] * (MOST - len(words))
    outputs = [len(weight) for weight in weights] + [0] * (MOST - len(weights))
    y = empty_sums(weights, x, share)
    if rows == 1:
        count, block, warps = (4, 256, 2) if ways > 1 else (2, 2048, 8) if d % 2048 == 0 else (1, 4096, 4)
        _one_row[sum(triton.cdiv(o, count) for o in outputs),](
            *words, *outputs, x, y, d, ways, count, block, ahead, num_warps=warps, **launch(ahead))
    else:
        count, block = (64 if rows <= 16 else 128), _block_of(rows, ways)
        _few_rows[sum(triton.cdiv(o, count) for o in outputs), len(y)](
            *words, *outputs, x, y, rows, d, share, ways, max(16, triton.next_power_of_2(rows)), count, block,
            4 if ways == 1 else 3, ahead, num_warps=4, **launch(ahead))
    return y


def empty_sums(weights: list[Tensor], x: Tensor, share: int) -> Tensor:
    """Where `sums` go."""
    rows, _, d = x.shape
    return x.new_empty((triton.cdiv(d, share), rows, sum(len(weight) for weight in weights)), dtype=torch.float32)


def share(weights: list[Tensor], x: Tensor) -> int:
    """How many of the inputs, in whole blocks, a program should sum. (It is an argument of `sums` so that it stands in
    a compiled graph: torch's cache between processes does not look at sizes within one.)
    """
    rows, ways, d = x.shape
    parts = 1 if rows == 1 else max(1, round(2**15 / sum(len(weight) for weight in weights)))  # 512 programs
    block = _block_of(rows, ways)
    return triton.cdiv(triton.cdiv(d, parts), block) * block


def ways(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows "b d" as `sums` takes them, "b w d/w": four bytes are read as a word; byte i of word j is input 4 j + i."""
    count = 4 if dtype == torch.int8 and x.shape[-1] % 4 == 0 else 1
    return x.unflatten(-1, (-1, count)).mT.contiguous()


def _block_of(rows: int, ways: int) -> int:
    return 128 if ways == 1 else 64 if rows <= 16 else 32


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
def _number(words, i: tl.constexpr, ways: tl.constexpr):
    """The words as floats; of four in each, number i: as the last byte of 2**23 + 128, which is taken off again (to
    convert a byte takes four times as long)."""
    if ways == 1:
        number = words.to(tl.float32)
    else:
        number = (((words ^ -2139062144) >> 8 * i) & 255 | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return number


@triton.jit
def _one_row(w0, w1, w2, o0, o1, o2, x, y, d: tl.constexpr, ways: tl.constexpr, OUTPUTS: tl.constexpr,
             BLOCK: tl.constexpr, EARLY: tl.constexpr):
    weight, outputs, o, first = _mine(w0, w1, w2, o0, o1, o2, OUTPUTS)
    k = tl.arange(0, BLOCK)
    at, there = weight + o[:, None].to(tl.int64) * d + k[None, :], (o < outputs)[:, None]
    words = tl.load(at, mask=there & (k < d)[None, :], other=0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()  # for x; the weight is older
    total = tl.zeros([OUTPUTS, BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        following = words
        if start + BLOCK < d:
            following = tl.load(at + start + BLOCK, mask=there & (start + BLOCK + k < d)[None, :], other=0,
                                eviction_policy="evict_first")
        for i in tl.static_range(ways):
            row = tl.load(x + i * d + start + k, mask=start + k < d, other=0).to(tl.float32)
            total += _number(words, i, ways) * row[None, :]
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
        for i in tl.static_range(ways):
            row = tl.load(x + (r[None, :] * ways + i) * d + begin + start + k[:, None],
                          mask=(r < rows)[None, :] & inside[:, None], other=0)
            total = tl.dot(_number(words, i, ways).to(row.dtype), row, total)
    if EARLY:
        gdc_launch_dependents()
    place = (tl.program_id(1).to(tl.int64) * rows + r[None, :]) * (o0 + o1 + o2) + first + o[:, None]
    tl.store(y + place, total, mask=(r < rows)[None, :] & (o < outputs)[:, None])


define("sums(Tensor[] weights, Tensor x, int share) -> Tensor", sums, empty_sums)
