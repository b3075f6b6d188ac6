"""RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from llama_fn.shapes import typed
from llama_fn.transforms.tapped import Tapped, scale_observed


@typed
def rms_norm(weight: Float[Tensor, "d"] | Tapped, x: Float[Tensor, "*b t d"], eps: float) -> Float[Tensor, "*b t d"]:
    """The mean square is taken in float32 at least and the quotient cast back before the weight, as Meta does."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return scaled(weight, (exact * scale).to(x.dtype))


@typed
def scaled(weight: Float[Tensor, "d"] | Tapped, x: Float[Tensor, "*b t d"]) -> Float[Tensor, "*b t d"]:
    """x times the weight."""
    if isinstance(weight, Tapped):
        plain, tap = weight.use()
        return scale_observed(x * plain, x, tap)
    return x * weight
