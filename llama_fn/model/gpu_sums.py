"""Few rows times matrices on a GPU, which torch has no kernel for that reads them, bytes too, at the memory's speed.

The first block of weights is older than the step, so that it is on its way before the kernel before has ended. Sizes of
blocks are the fastest of some ten that were measured (H100).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.model import gpu
from llama_fn.model.gpu import ask, mine
from llama_fn.model.operators import define

OUTPUTS, BLOCK = 64, 128  # that a program multiplies at once, and inputs
ASKED = 2**22  # bytes of the next weights that the last programs ask for


def sums(weights: list[Tensor], x: Tensor, share: int, following: Tensor | None = None) -> Tensor:
    """Products summed in float32, of up to `gpu.MOST` weights "o d" of one dtype and rows "b d": "p b o", the outputs
    of all weights side by side. The sum over p is missing: a program sums a `share` of the inputs. `following` is the
    weight that will be read next.
    """
    y, x, ahead = empty_sums(weights, x, share), x.contiguous(), gpu.early(x)
    outputs, (rows, d), bytes_ = [len(weight) for weight in weights], x.shape, weights[0].dtype == torch.int8
    programs, asking, asked = sum(triton.cdiv(o, OUTPUTS) for o in outputs), 0, 0
    if ahead and following is not None and following.data_ptr() % 16 == 0:
        asking = max(1, programs * len(y) // 4)
        asked = min(ASKED, following.nbytes) // asking // 16 * 16
    _few_rows[programs, len(y)](
        *gpu.filled(weights), *outputs, *[0] * (gpu.MOST - len(outputs)), x, following if asked else x, y, rows, d,
        share, max(16, triton.next_power_of_2(rows)), OUTPUTS, BLOCK, 3 if bytes_ else 4, asking, asked, bytes_, ahead,
        num_warps=4, **gpu.launch(ahead))
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
    programs = 396 if weights[0].dtype == torch.int8 else 256
    parts = max(1, round(programs * OUTPUTS / sum(len(weight) for weight in weights)))
    return triton.cdiv(triton.cdiv(x.shape[1], parts), BLOCK) * BLOCK


def _pairs(power: str, kind: str) -> str:
    """Of four bytes two times two numbers: see `_exact`."""
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
def _exact(number, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """Bytes as numbers of 16 bits. In `PAIRS`: the seven lower bits as the last ones of a power of two, less that power
    or, where the eighth is set, less what it is with that, too (128 and 256 in bfloat16, 1024 and 1152 in float16).
    """
    if not PAIRS:
        exact = number.to(dtype)
    elif dtype == tl.bfloat16:
        exact = tl.inline_asm_elementwise(BFLOAT16, "=r,=r,r", [number], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        exact = tl.inline_asm_elementwise(FLOAT16, "=r,=r,r", [number], dtype=tl.float16, is_pure=True, pack=4)
    return exact


@triton.jit
def _few_rows(w0, w1, w2, o0, o1, o2, x, following, y, rows, d: tl.constexpr, share: tl.constexpr, ROWS: tl.constexpr,
              OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ASKING: tl.constexpr,
              ASKED: tl.constexpr, BYTES: tl.constexpr, EARLY: tl.constexpr):
    weight, _, outputs, o, first = mine(w0, w1, w2, w0, w1, w2, o0, o1, o2, OUTPUTS)
    row, k, begin = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.program_id(1) * share
    if BYTES:  # rows times outputs: where a byte is made a number, there the product takes it
        row, o, of_row, of_output = row[:, None], o[None, :], k[None, :], k[:, None]
    else:  # outputs times rows: 6 % faster
        row, o, of_row, of_output = row[None, :], o[:, None], k[:, None], k[None, :]
    there, own = row < rows, o < outputs
    x += row * d + begin
    weight += o.to(tl.int64) * d + begin
    numbers = tl.load(weight + of_output, mask=own & (begin + of_output < d), other=0)
    if EARLY:
        gdc_wait()  # for x; the weight is older
    inputs = tl.load(x + of_row, mask=there & (begin + of_row < d), other=0)
    total = tl.zeros([ROWS, OUTPUTS] if BYTES else [OUTPUTS, ROWS], tl.float32)
    for start in tl.range(BLOCK, share, BLOCK, num_stages=STAGES):
        more = tl.load(weight + start + of_output, mask=own & (begin + start + of_output < d), other=0)
        taken = tl.load(x + start + of_row, mask=there & (begin + start + of_row < d), other=0)
        total = _product(more, taken, total, BYTES, EARLY)
    total = _product(numbers, inputs, total, BYTES, EARLY)
    if ASKED > 0:
        programs = tl.num_programs(0) * tl.num_programs(1)
        last = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) - (programs - ASKING)
        if last >= 0:
            ask(following.to(tl.pointer_type(tl.int8)) + last.to(tl.int64) * ASKED, ASKED)
    if EARLY:
        gdc_launch_dependents()
    place = (tl.program_id(1).to(tl.int64) * rows + row) * (o0 + o1 + o2) + first + o
    tl.store(y + place, total, mask=there & own)


@triton.jit
def _product(weights, inputs, total, BYTES: tl.constexpr, PAIRS: tl.constexpr):
    return tl.dot(inputs, _exact(weights, inputs.dtype, PAIRS), total) if BYTES else tl.dot(weights, inputs, total)


define("sums(Tensor[] weights, Tensor x, int share) -> Tensor", empty_sums, CUDA=sums)
