"""The linear map: the written-out definition, and the kernel that computes it, for every kind of weight.

A weight is a tensor, or a `NamedTuple` that stands in a tensor's place in the tree and says what is to be computed
instead of W x. The rest of the model does not notice.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Shaped
from torch import Tensor

from llama_fn.model.quantized import Quantized
from llama_fn.model.tapped import Tapped, linear_observed
from llama_fn.shapes import transforms, typed


class Adapted(NamedTuple):
    """W + B A, where B and A are thin: x goes through W and, beside it, through A, then B (Hu et al. 2021, eq. 3)."""

    weight: Any  # a weight of any kind
    a: Float[Tensor, "_ ..."] | Tapped
    b: Float[Tensor, "... _"] | Tapped

    @property
    def shape(self) -> tuple[int, ...]:
        """That of W."""
        return self.weight.shape


Kind = Adapted | Tapped | Quantized  # of a weight that is no tensor


def written_out(weight: Float[Tensor, "o d"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """The definition: y[o] = sum over d of weight[o, d] x[d]."""
    return einsum(weight, x, "o d, ... d -> ... o")


@typed
def one_row(x: Float[Tensor, "*b d"], weight: Shaped[Tensor, "o d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for one x alone, as a compiler likes it: products summed in float32, at the speed of memory."""
    exact = torch.promote_types(x.dtype, torch.float32)
    # With strides of its own, x has to lie in memory: inductor would else compute it, and the norm before it, again for
    # each row of the weight. Quarters are summed side by side, so that four pages are on their way at once: 16.7 GB/s
    # where one after another makes 11.4, and oneDNN's kernel 12.1 (two cores, bfloat16).
    row = x.reshape(-1).to(exact).as_strided((x.shape[-1],), (1,))
    parts = [(part.to(exact) * row).sum(-1) for part in weight.chunk(4)]
    return torch.cat(parts).to(x.dtype).reshape(*x.shape[:-1], -1)


@typed
def packed(weight: Quantized, x: Float[Tensor, "..."], inputs: int) -> Float[Tensor, "..."]:
    """`linear` of an 8-bit weight and bfloat16 rows by torch's own kernel, which makes no bfloat16 matrix of it."""
    outer, rows = weight.scale.shape, x.flatten(-inputs)
    matrix, scale = weight.values.reshape(math.prod(outer), -1), weight.scale.flatten().to(x.dtype)
    out = torch._weight_int8pack_mm(rows.reshape(-1, rows.shape[-1]), matrix, scale)
    return out.reshape(*x.shape[:-inputs], *outer)


def _is_for_packed(x: Tensor, inputs: int) -> bool:
    """Whether that kernel can be had, and is faster: up to 64 rows, where nothing is mapped or differentiated. Of
    widths that 16 does not divide, it reads beyond the end and is wrong (torch 2.13).
    """
    return (x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[:-inputs].numel() <= 64
            and x.shape[-inputs:].numel() % 16 == 0 and not x.requires_grad and not transforms()
            and not _is_one_row(x, inputs))


def _is_one_row(x: Tensor, inputs: int) -> bool:
    """Whether a compiled step on the CPU multiplies one row: oneDNN's kernels reach half of the memory's speed there.
    Under a transform an axis may be hidden, and there may be many rows.
    """
    return (torch.compiler.is_compiling() and x.device.type == "cpu" and x.shape[:-inputs].numel() == 1
            and not transforms())


@typed
def linear(weight: Shaped[Tensor, "..."] | Kind, x: Float[Tensor, "..."],
           inputs: int = 1) -> Float[Tensor, "..."]:
    """`written_out`, where the last `inputs` axes of the weight and of x together are d, and the weight's others o."""
    if isinstance(weight, Adapted):
        return linear(weight.weight, x, inputs) + linear(weight.b, linear(weight.a, x, inputs))
    if isinstance(weight, Quantized):
        if _is_for_packed(x, inputs):
            return packed(weight, x, inputs)
        exact = torch.promote_types(x.dtype, torch.float32)
        return (linear(weight.values, x, inputs).to(exact) * weight.scale).to(x.dtype)
    if isinstance(weight, Tapped):
        plain, tap = weight.use()
        return linear_observed(linear(plain, x, inputs), x.flatten(-inputs), tap, len(plain.shape) - inputs)
    outer = weight.shape[:-inputs]
    matrix = weight.reshape(math.prod(outer), -1)
    if _is_one_row(x, inputs):
        return one_row(x.flatten(-inputs), matrix).unflatten(-1, outer)
    matrix = matrix if matrix.is_floating_point() else matrix.to(x.dtype)  # 8 bits are exact in bfloat16
    return F.linear(x.flatten(-inputs), matrix).unflatten(-1, outer)
