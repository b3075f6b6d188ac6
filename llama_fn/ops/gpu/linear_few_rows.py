"""A few rows times matrices on a GPU, at the memory's speed. Torch has no such kernel, least of all for 8 bits.

Weights do not change during a step. So a program loads its first block of weights while the previous kernel still
runs, and the next kernel's programs may start once all programs of this one have started (PDL, programmatic dependent
launch). The block sizes were the fastest of about fifty that were measured on an H100.
"""

# The checker takes a Triton kernel's body and its launch `kernel[grid](...)` for plain Python.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.ops.gpu import launch as gpu
from llama_fn.ops.gpu.launch import program_outputs, silu
from llama_fn.ops.operators import define

OUTPUTS, BLOCK = 64, 128  # the outputs of a program, and the inputs that it multiplies at a time
FIRST = 512  # inputs in a program's first block, for weights of 8 bits and up to 16 rows
TARGET_PROGRAMS = 256  # programs: about two for each of an H100's 132 multiprocessors


class Weights(NamedTuple):
    """Matrices "o d" of one dtype that multiply the same rows, and the scales of their outputs (or an empty list)."""

    values: list[Tensor]
    scales: list[Tensor]


def split_k(weights: list[Tensor], x: Tensor, split_size: int) -> Tensor:
    """The split-K parts "p b o" of W x in float32, for weights "o d" of one dtype and rows "b d".

    There are up to `gpu.MAX_WEIGHTS` weights, whose outputs are concatenated. Each part is the sum over `split_size`
    inputs. The caller adds up the parts.
    """
    y = empty_split_k(weights, x, split_size)
    _launch(weights, [], x, y, split_size, len(y), gated=False)
    return y


def empty_split_k(weights: list[Tensor], x: Tensor, split_size: int) -> Tensor:
    """Memory for the result of `split_k`."""
    rows, d = x.shape
    return x.new_empty((triton.cdiv(d, split_size), rows, sum(len(weight) for weight in weights)), dtype=torch.float32)


def split_k_arguments(weights: Weights, x: Tensor) -> tuple[Tensor, tuple]:
    """The result of `split_k`, and the first arguments of a kernel that calls `reduce_split_k`."""
    parts = split_k(weights.values, x, split_size(weights.values, x))
    outputs = [len(value) for value in weights.values]
    return parts, (parts, *gpu.padded(weights.scales or [parts]), *outputs, *[0] * (gpu.MAX_WEIGHTS - len(outputs)))


def gated_product(weights: Weights, x: Tensor) -> Tensor:
    """The gated product silu(W0 x) * W1 x of rows "b d" and two weights "o d": "b o".

    `split_size` must be all inputs, so that one program has the whole sum.
    """
    y = x.new_empty((len(x), len(weights.values[0])))
    _launch(*weights, x, y, split_size(weights.values, x), 1, gated=True)
    return y


def _launch(weights: list[Tensor], scales: list[Tensor], x: Tensor, y: Tensor, split_size: int,
            parts: int, gated: bool) -> None:
    outputs, (rows, d), int8 = [len(weight) for weight in weights], x.shape, weights[0].dtype == torch.int8
    programs = triton.cdiv(2 * outputs[0], OUTPUTS) if gated else sum(triton.cdiv(o, OUTPUTS) for o in outputs)
    pdl, first = gpu.has_pdl(x), FIRST if int8 and rows <= 16 and split_size % FIRST == 0 else BLOCK
    _few_rows[programs, parts](
        *gpu.padded(weights), *gpu.padded(scales or [y]), *outputs, *[0] * (gpu.MAX_WEIGHTS - len(outputs)),
        x.contiguous(), y, rows, d, split_size, max(16, triton.next_power_of_2(rows)), OUTPUTS, first, BLOCK,
        3 if int8 else 4, int8, gated, bool(scales), pdl, num_warps=4, **gpu.launch(pdl))


def split_size(weights: list[Tensor], x: Tensor) -> int:
    """How many inputs each program sums (split-K): whole blocks, such that there are a few hundred programs.

    It is an argument of the operator, so that it is part of the compiled graph. If the operator computed it, torch's
    on-disk cache of graphs would not notice that it changed.
    """
    int8, tiles = weights[0].dtype == torch.int8, sum(len(weight) for weight in weights) / OUTPUTS
    parts = max(1, round((396 if int8 else 256) / tiles))
    sizes = [triton.cdiv(triton.cdiv(x.shape[1], parts), block) * block for block in (FIRST, BLOCK)]
    return sizes[0] if int8 and tiles * triton.cdiv(x.shape[1], sizes[0]) >= TARGET_PROGRAMS else sizes[1]


def _pairs(power: str, kind: str) -> str:
    """PTX that converts four signed bytes to two pairs of 16-bit floats; `_from_bytes` says how."""
    two = """
        prmt.b32 two, $2, 0, {};
        lop3.b32 low, two, 0x007f007f, {power}, 0xea;
        lop3.b32 eighth, two, 0x00800080, {power}, 0xea;
        sub.{kind} ${}, low, eighth;"""
    parts = (two.format(which, i, power=power, kind=kind) for i, which in enumerate(("0x4140", "0x4342")))
    return "{ .reg .b32 two, low, eighth;" + "".join(parts) + " }"


BFLOAT16 = tl.constexpr(_pairs("0x43004300", "bf16x2"))
FLOAT16 = tl.constexpr(_pairs("0x64006400", "f16x2"))


@triton.jit
def _from_bytes(number, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """Signed bytes as 16-bit floats, exactly.

    With PAIRS, two bytes are converted at a time. The seven lower bits are put into the mantissa of a power of two (128
    in bfloat16, 1024 in float16). Then that power is subtracted, and 128 more where the sign bit is set.
    """
    if not PAIRS:
        exact = number.to(dtype)
    elif dtype == tl.bfloat16:
        exact = tl.inline_asm_elementwise(BFLOAT16, "=r,=r,r", [number], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        exact = tl.inline_asm_elementwise(FLOAT16, "=r,=r,r", [number], dtype=tl.float16, is_pure=True, pack=4)
    return exact


@triton.jit
def _few_rows(w0, w1, w2, s0, s1, s2, o0, o1, o2, x, y, rows, d: tl.constexpr, split_size: tl.constexpr,
              ROWS: tl.constexpr, OUTPUTS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
              INT8: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr):
    if GATED:  # outputs of the two weights alternate, so that a gate and its factor are in one program
        outputs, first, both = o0, 0, tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        o, weight = both // 2, tl.where(both % 2 == 1, w1, w0)
        if SCALED:
            factors = tl.load(tl.where(both % 2 == 1, s1, s0) + o, mask=o < o0, other=0)
        weight = weight[None, :] if INT8 else weight[:, None]
    else:
        weight, _, outputs, o, first = program_outputs(w0, w1, w2, s0, s1, s2, o0, o1, o2, OUTPUTS)
    row, k, begin = tl.arange(0, ROWS), tl.arange(0, FIRST), tl.program_id(1) * split_size
    if INT8:  # rows times outputs: the product reads a converted byte straight from its register
        row, o, of_row, of_output = row[:, None], o[None, :], k[None, :], k[:, None]
    else:  # outputs times rows: 6 % faster
        row, o, of_row, of_output = row[None, :], o[:, None], k[:, None], k[None, :]
    row_mask, output_mask = row < rows, o < outputs
    x += row * d + begin
    weight += o.to(tl.int64) * d + begin
    numbers = tl.load(weight + of_output, mask=output_mask & (begin + of_output < d), other=0)
    if PDL:
        gdc_wait()  # for x, which the previous kernel writes; no kernel writes the weights
        gdc_launch_dependents()
    inputs = tl.load(x + of_row, mask=row_mask & (begin + of_row < d), other=0)
    total = tl.zeros([ROWS, OUTPUTS] if INT8 else [OUTPUTS, ROWS], tl.float32)
    k = tl.arange(0, BLOCK)
    of_row, of_output = (k[None, :], k[:, None]) if INT8 else (k[:, None], k[None, :])
    for start in tl.range(FIRST, split_size, BLOCK, num_stages=STAGES):
        next_numbers = tl.load(weight + start + of_output, mask=output_mask & (begin + start + of_output < d), other=0)
        next_inputs = tl.load(x + start + of_row, mask=row_mask & (begin + start + of_row < d), other=0)
        total = _product(next_numbers, next_inputs, total, INT8, PDL)
    total = _product(numbers, inputs, total, INT8, PDL)
    if GATED:
        dtype: tl.constexpr = y.dtype.element_ty
        out = total if INT8 else tl.trans(total)
        if SCALED:
            out *= factors[None, :]
        gate, up = tl.split(tl.reshape(out.to(dtype).to(tl.float32), [ROWS, OUTPUTS // 2, 2]))
        row, o = tl.arange(0, ROWS)[:, None], tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)[None, :]
        tl.store(y + row.to(tl.int64) * o0 + o, silu(gate, dtype) * up, mask=(row < rows) & (o < o0))
    else:
        place = (tl.program_id(1).to(tl.int64) * rows + row) * (o0 + o1 + o2) + first + o
        tl.store(y + place, total, mask=row_mask & output_mask)


@triton.jit
def _product(weights, inputs, total, INT8: tl.constexpr, PAIRS: tl.constexpr):
    return tl.dot(inputs, _from_bytes(weights, inputs.dtype, PAIRS), total) if INT8 else tl.dot(weights, inputs, total)


@triton.jit
def reduce_split_k(parts, s0, s1, s2, o0, o1, o2, row, rows, o, mask, dtype: tl.constexpr, P: tl.constexpr,
           SCALED: tl.constexpr):
    """Outputs `o` of one row: the sum of the split-K parts, times the scales, rounded to `dtype`."""
    total = tl.zeros(o.shape, tl.float32)
    for p in tl.static_range(P):
        total += tl.load(parts + (p * rows + row).to(tl.int64) * (o0 + o1 + o2) + o, mask=mask, other=0)
    if SCALED:
        scale = tl.where(o < o0, s0 + o, tl.where(o < o0 + o1, s1 + (o - o0), s2 + (o - o0 - o1)))
        total *= tl.load(scale, mask=mask, other=0)
    return total.to(dtype).to(tl.float32)


define("linear_split_k(Tensor[] weights, Tensor x, int split_size) -> Tensor", empty_split_k, CUDA=split_k)
