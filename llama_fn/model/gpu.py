"""What a GPU's kernels have in common.

On Hopper a kernel is there before the one before it has ended (programmatic launch), waits for it before it reads or
writes what is not older than the step, and lets the next one come before it ends itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 3  # weights that one kernel takes


def early(x: Tensor) -> bool:
    """Whether this GPU can begin a kernel before the one before it has ended."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)


def launch(ahead: bool) -> dict[str, bool]:
    """How a kernel is launched that may."""
    return {"launch_pdl": True} if ahead else {}  # not every GPU's compiler knows the word


def ways(weights: list[Tensor], x: Tensor) -> int:
    """How many numbers are read at once: four bytes as a word, and the inputs that they meet as another."""
    return 4 if weights[0].dtype == torch.int8 and x.itemsize == 2 and x.shape[-1] % 4 == 0 else 1


def words(weights: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor, bool]:
    """The weights as what is read at once and the rows as they can be, and whether a kernel may begin `early`. Weights
    must be older than the step, and in one piece.
    """
    ahead, x = early(x), aligned(x.contiguous())
    if any(weight.data_ptr() % 16 for weight in weights):  # it begins where no word does
        weights, ahead = [weight.clone() for weight in weights], False
    return [weight.view(torch.int32) if ways(weights, x) > 1 else weight for weight in weights], x, ahead


def aligned(x: Tensor) -> Tensor:
    """With its first number where words begin."""
    return x.clone() if x.data_ptr() % 16 else x


def filled(some: list[Tensor]) -> list[Tensor]:
    """As many as a kernel takes."""
    return some + some[-1:] * (MOST - len(some))


@triton.jit
def mine(w0, w1, w2, s0, s1, s2, o0, o1, o2, OUTPUTS: tl.constexpr):
    """Of this program: its weight and that one's scales, how many outputs it has, which of them are this program's own,
    and where they go.
    """
    program, weight, scale, outputs, first = tl.program_id(0), w0, s0, o0, 0
    if program >= tl.cdiv(o0, OUTPUTS):
        program, weight, scale, outputs, first = program - tl.cdiv(o0, OUTPUTS), w1, s1, o1, o0
        if program >= tl.cdiv(o1, OUTPUTS):
            program, weight, scale, outputs, first = program - tl.cdiv(o1, OUTPUTS), w2, s2, o2, o0 + o1
    return weight, scale, outputs, program * OUTPUTS + tl.arange(0, OUTPUTS), first


@triton.jit
def number(fours, i: tl.constexpr, dtype: tl.constexpr):
    """Number i of each four of 16 bits."""
    return (fours >> 16 * i).to(tl.int16).to(dtype, bitcast=True)
