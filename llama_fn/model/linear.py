"""The linear map."""

import math
from collections.abc import Sequence

from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llama_fn.ops.linear import choose, several_linears
from llama_fn.ops.weight import Matrix
from llama_fn.shapes import typed


def written_out(weight: Float[Tensor, "o d"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """The definition: y[o] = sum over d of weight[o, d] x[d]."""
    return einsum(weight, x, "o d, ... d -> ... o")


@typed
def linear(weight: Float[Matrix, "..."], x: Float[Tensor, "..."], inputs: int = 1) -> Float[Tensor, "..."]:
    """The linear map of a weight with any number of axes: the last `inputs` axes of weight and of x are summed over.

    `wo`, for example, is "d k g h" and sums over three. To the definition, these axes together are d, and the weight's
    other axes together are o.
    """
    if not isinstance(weight, Tensor):
        return weight.linear(x, inputs)
    matrix, x = weight.reshape(-1, math.prod(weight.shape[-inputs:])), x.flatten(-inputs)
    return choose(matrix, x, written_out)(matrix, x).unflatten(-1, weight.shape[:-inputs])


def linears(weights: Sequence[Matrix], x: Float[Tensor, "..."]) -> list[Float[Tensor, "..."]]:
    """`linear` of each weight with the same x: in one kernel where there is one, else one after the other."""
    ys = several_linears(weights, x)
    return [linear(weight, x) for weight in weights] if ys is None else ys
