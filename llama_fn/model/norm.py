"""RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from llama_fn.ops.weight import Vector
from llama_fn.shapes import typed


@typed
def rms_norm(weight: Float[Vector, "d"], x: Float[Tensor, "*b t d"], eps: float) -> Float[Tensor, "*b t d"]:
    """Divide each token by its root mean square, then multiply by the weight.

    The mean square and the quotient are computed in float32 at least. The quotient is cast back to the dtype of x
    before the weight multiplies it, as in Meta's code.
    """
    upcast = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = torch.rsqrt(upcast.square().mean(-1, keepdim=True) + eps)
    normalized = (upcast * inverse_rms).to(x.dtype)
    return normalized * weight if isinstance(weight, Tensor) else weight.scale(normalized)
