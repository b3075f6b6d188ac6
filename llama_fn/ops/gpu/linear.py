"""The linear map of a few rows by the kernels in Triton."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama_fn.modes import under_dynamo
from llama_fn.ops.aten.few_rows import Flat
from llama_fn.ops.quantized import Quantized
from llama_fn.ops.weight import Matrix, values_alone
from llama_fn.shapes import typed


@typed
def by_triton(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows on a GPU, by a Triton kernel that reads each weight once."""
    return several_by_triton([weight], x)[0]


def several_by_triton(weights: Sequence[Any], x: Tensor) -> list[Tensor]:
    """`by_triton` of up to three weights of one kind, in one kernel."""
    # Both import triton, which only machines with a GPU have.
    from llama_fn.ops.gpu import linear_few_rows, linear_one_row  # noqa: F401

    weights = [weight.flatten(0, -2) if isinstance(weight, Tensor) else weight.flat() for weight in weights]
    values = [weight.values if isinstance(weight, Quantized) else weight for weight in weights]
    scales = [weight.scale for weight in weights if isinstance(weight, Quantized)]
    rows, outputs = x.reshape(-1, x.shape[-1]), [len(value) for value in values]
    if len(rows) == 1:
        y = torch.ops.llama_fn.linear_one_row(values, scales, rows)
        ys = y.split(outputs, -1) if len(outputs) > 1 else [y]
    else:
        ys = torch.ops.llama_fn.linear_split_k(values, rows, linear_few_rows.split_size(values, rows)).sum(0)
        ys = ys.split(outputs, -1)
        ys = [y * scale for y, scale in zip(ys, scales, strict=True)] if scales else ys
    return [y.to(x.dtype).reshape(*x.shape[:-1], -1) for y in ys]


def accepts(weight: Flat, x: Tensor) -> bool:
    """Whether `by_triton` computes these, and faster than torch.

    It does so in a step that `jit_layers` compiles, where the weights are arguments. Rows have 16 bits; weights have
    the same dtype or 8 bits. Under dynamo it is not used.
    """
    if not x.is_cuda or under_dynamo():
        return False
    values = weight.values if isinstance(weight, Quantized) else weight
    scales_ready = not isinstance(weight, Quantized) or weight.scale.is_contiguous()
    return (isinstance(values, Tensor) and values.is_contiguous() and scales_ready
            and values.dtype in (x.dtype, torch.int8) and x.dtype in (torch.bfloat16, torch.float16)
            and 0 < x.shape[:-1].numel() <= max_rows(weight) and values_alone(x))


def max_rows(weight: Flat | Matrix) -> int:
    """The number of rows up to which these kernels are faster than torch's."""
    return 64 if isinstance(weight, Quantized) else 16
