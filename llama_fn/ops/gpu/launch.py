"""What the Triton kernels have in common.

From Hopper on, a kernel may start before the previous one has ended (programmatic dependent launch, PDL). It may read
at once what earlier steps wrote, such as weights. It waits for the previous kernel (`gdc_wait`) before it reads or
writes anything of this step, and it allows the next kernel to start (`gdc_launch_dependents`) before it ends itself.

Names in all kernels: w0 to w2 are up to three weights, s0 to s2 their scales, o0 to o2 their numbers of outputs;
SCALED says whether there are scales, PDL whether the kernel was launched dependently, P is the number of split-K parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WEIGHTS = 3  # weights in one kernel call


def has_pdl(x: Tensor) -> bool:
    """Whether this GPU has programmatic dependent launch."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)


def launch(pdl: bool) -> dict[str, bool]:
    """The launch options of a kernel, with or without programmatic dependent launch."""
    return {"launch_pdl": True} if pdl else {}  # compilers for other GPUs do not know the option


def padded(tensors: list[Tensor]) -> list[Tensor]:
    """The list, padded to `MAX_WEIGHTS` tensors; a kernel does not read the added ones."""
    return tensors + tensors[-1:] * (MAX_WEIGHTS - len(tensors))


@triton.jit
def program_outputs(w0, w1, w2, s0, s1, s2, o0, o1, o2, OUTPUTS: tl.constexpr):
    """The program's part of the work, when the programs are divided among up to three weights.

    Five values: the weight, its scales, its number of outputs, the outputs that this program computes, and where the
    weight's outputs begin in the result.
    """
    program, weight, scale, outputs, first = tl.program_id(0), w0, s0, o0, 0
    if program >= tl.cdiv(o0, OUTPUTS):
        program, weight, scale, outputs, first = program - tl.cdiv(o0, OUTPUTS), w1, s1, o1, o0
        if program >= tl.cdiv(o1, OUTPUTS):
            program, weight, scale, outputs, first = program - tl.cdiv(o1, OUTPUTS), w2, s2, o2, o0 + o1
    return weight, scale, outputs, program * OUTPUTS + tl.arange(0, OUTPUTS), first


@triton.jit
def silu(x, dtype: tl.constexpr):
    """The function silu of a float32, rounded to `dtype` as a kernel of its own would round."""
    return (x / (1 + tl.exp(-x))).to(dtype).to(tl.float32)


@triton.jit
def prefetch(at, size: tl.constexpr):
    """Prefetch `size` bytes into the L2 cache."""
    tl.inline_asm_elementwise("""{
        .reg .pred first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, thread;
        }""", "=r,l,r", [at.to(tl.int64), tl.full([], size, tl.int32)], dtype=tl.int32, is_pure=False, pack=1)
