"""The linear map: the written-out definition, and the kernel that computes it, for every kind of weight.

A weight is a tensor, or a `NamedTuple` that stands in a tensor's place in the tree and says what is to be computed
instead of W x. The rest of the model does not notice.
"""

import math
from typing import Any, NamedTuple

import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llama_fn.model.tapped import Tapped, linear_observed
from llama_fn.shapes import typed


class Adapted(NamedTuple):
    """W + B A, where B and A are thin: x goes through W and, beside it, through A, then B (Hu et al. 2021, eq. 3)."""

    weight: Any  # a weight of any kind
    a: Float[Tensor, "_ ..."] | Tapped
    b: Float[Tensor, "... _"] | Tapped

    @property
    def shape(self) -> tuple[int, ...]:
        """That of W."""
        return self.weight.shape


def written_out(weight: Float[Tensor, "o d"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """The definition: y[o] = sum over d of weight[o, d] x[d]."""
    return einsum(weight, x, "o d, ... d -> ... o")


@typed
def linear(weight: Float[Tensor, "..."] | Adapted | Tapped, x: Float[Tensor, "..."],
           inputs: int = 1) -> Float[Tensor, "..."]:
    """`written_out`, where the last `inputs` axes of the weight and of x together are d, and the weight's others o."""
    if isinstance(weight, Adapted):
        return linear(weight.weight, x, inputs) + linear(weight.b, linear(weight.a, x, inputs))
    if isinstance(weight, Tapped):
        plain, tap = weight.use()
        return linear_observed(linear(plain, x, inputs), x.flatten(-inputs), tap, len(plain.shape) - inputs)
    outer = weight.shape[:-inputs]
    return F.linear(x.flatten(-inputs), weight.reshape(math.prod(outer), -1)).unflatten(-1, outer)
