"""RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from llama_fn.ops.weight import Vector
from llama_fn.shapes import typed


@typed
def rms_norm(weight: Float[Vector, "d"], x: Float[Tensor, "*b t d"], eps: float) -> Float[Tensor, "*b t d"]:
    """The mean square is taken in float32 at least and the quotient cast back before the weight, as Meta does."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    unit = (exact * scale).to(x.dtype)
    return unit * weight if isinstance(weight, Tensor) else weight.scale(unit)
