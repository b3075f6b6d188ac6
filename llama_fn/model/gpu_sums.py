"""Few rows times matrices on a GPU, which torch has no kernel for that reads them, bytes too, at the memory's speed.

Sizes of blocks are the fastest of some ten that were measured (H100, H200).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.model import gpu
from llama_fn.model.gpu import mine, number
from llama_fn.model.operators import define


def sums(weights: list[Tensor], x: Tensor, share: int) -> Tensor:
    """Products summed in float32, of up to `gpu.MOST` weights "o d" of one dtype and rows "b d": "p b o", the outputs
    of all weights side by side. The sum over p is missing: a program sums a `share` of the inputs.
    """
    y, ways = empty_sums(weights, x, share), gpu.ways(weights, x)
    weights, x, ahead = gpu.words(weights, x)
    outputs, (rows, _) = [len(weight) for weight in weights], x.shape
    count, block = _block_of(rows, ways)
    _few_rows[sum(triton.cdiv(o, count) for o in outputs), len(y)](
        *gpu.filled(weights), *outputs, *[0] * (gpu.MOST - len(outputs)), x, y, rows, weights[0].shape[1],
        share // ways, ways, max(16, triton.next_power_of_2(rows)), count, block, 4, ahead, num_warps=4,
        **gpu.launch(ahead))
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
    rows, d, ways = *x.shape, gpu.ways(weights, x)
    count, block = _block_of(rows, ways)
    programs = 256 if ways == 1 or rows > 16 else 512
    parts = max(1, round(programs * count / sum(len(weight) for weight in weights)))
    return triton.cdiv(triton.cdiv(d, parts), ways * block) * ways * block


def _block_of(rows: int, ways: int) -> tuple[int, int]:
    """Of several rows, the outputs and the inputs (in words) that a program multiplies at once."""
    return (64 if rows <= 16 else 128), (128 if ways == 1 else 32)


@triton.jit
def _byte(words, i: tl.constexpr):
    """Byte i of each word as a float: as the last bits of 2**23 + 128, which is taken off again. (To convert a byte
    takes four times as long.)
    """
    return (((words ^ -2139062144) >> 8 * i) & 255 | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _few_rows(w0, w1, w2, o0, o1, o2, x, y, rows, d: tl.constexpr, share: tl.constexpr, ways: tl.constexpr,
              ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
              EARLY: tl.constexpr):
    weight, _, outputs, o, first = mine(w0, w1, w2, w0, w1, w2, o0, o1, o2, OUTPUTS)
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
                row = number(fours, i, x.dtype.element_ty)
                total = tl.dot(_byte(words, i).to(row.dtype), row, total)
    if EARLY:
        gdc_launch_dependents()
    place = (tl.program_id(1).to(tl.int64) * rows + r[None, :]) * (o0 + o1 + o2) + first + o[:, None]
    tl.store(y + place, total, mask=(r < rows)[None, :] & (o < outputs)[:, None])


define("sums(Tensor[] weights, Tensor x, int share) -> Tensor", empty_sums, CUDA=sums)
