"""What a GPU's kernels have in common.

On Hopper a kernel is there before the one before it has ended (programmatic launch), waits for it before it reads or
writes what is not older than the step, and lets the next one come when it has read all that it reads.
"""

import torch
from torch import Tensor


def early(x: Tensor) -> bool:
    """Whether this GPU can begin a kernel before the one before it has ended."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)


def launch(ahead: bool) -> dict[str, bool]:
    """How a kernel is launched that may."""
    return {"launch_pdl": True} if ahead else {}  # not every GPU's compiler knows the word
