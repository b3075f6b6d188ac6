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
def silu(x, dtype: tl.constexpr):
    """Of float32, rounded as by itself."""
    return (x / (1 + tl.exp(-x))).to(dtype).to(tl.float32)


@triton.jit
def ask(at, size: tl.constexpr):
    """Have `size` bytes come into the second cache."""
    tl.inline_asm_elementwise("""{
        .reg .pred first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, thread;
        }""", "=r,l,r", [at.to(tl.int64), tl.full([], size, tl.int32)], dtype=tl.int32, is_pure=False, pack=1)
