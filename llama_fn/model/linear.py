"""The linear map: the written-out definition, and the kernel that computes it."""

import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llama_fn.shapes import typed


def written_out(weight: Float[Tensor, "o d"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """The definition: y[o] = sum over d of weight[o, d] x[d]."""
    return einsum(weight, x, "o d, ... d -> ... o")


@typed
def linear(weight: Float[Tensor, "o d"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out`, by torch's kernel."""
    return F.linear(x, weight)
