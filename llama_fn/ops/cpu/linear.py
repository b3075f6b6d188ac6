"""The linear map of a few rows on the CPU, by the C++ kernels of `linear_floats.cpp` and `linear_integers.cpp`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama_fn.modes import by_layers
from llama_fn.ops.aten.few_rows import Flat
from llama_fn.ops.cpu import build
from llama_fn.ops.operators import define
from llama_fn.ops.quantized import GROUP, Grouped, Quantized, has_own_dtypes
from llama_fn.ops.weight import values_alone
from llama_fn.shapes import typed


@typed
def by_cpp(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows on the CPU, by a kernel in C++."""
    return several_by_cpp([weight], x)[0]


def several_by_cpp(weights: Sequence[Flat], x: Tensor) -> list[Tensor]:
    """`by_cpp` of several weights of one kind, in one call."""
    ys = multiply(weights, x.reshape(-1, x.shape[-1]))
    return [y.to(x.dtype).reshape(*x.shape[:-1], -1) for y in ys]


def accepts(weight: Flat, x: Tensor) -> bool:
    """Whether `by_cpp` computes these: in a step of `jit_layers`, so that eager code waits for no compiler."""
    return by_layers() and supports(weight, x) and values_alone(x)


def supports(weight: Any, x: Tensor) -> bool:
    """Whether `multiply` computes this product. For quantized weights it rounds inputs, so they must be 16-bit."""
    rows, d = x.shape[:-1].numel(), x.shape[-1]
    if x.device.type != "cpu" or not 0 < rows <= max_rows(weight) or d == 0 or not build.vector_instructions():
        return False
    if isinstance(weight, Tensor):
        return weight.is_contiguous() and weight.dtype == x.dtype in build.DTYPES and d % 8 == 0
    return (isinstance(weight, Quantized | Grouped) and weight.values.is_contiguous() and has_own_dtypes(weight)
            and x.dtype in (torch.bfloat16, torch.float16) and d % GROUP == 0)


def max_rows(weight: Any) -> int:
    """The number of rows up to which these kernels are faster than torch's."""
    return 32 if isinstance(weight, Tensor) and build.vector_instructions() else 8


def multiply(weights: Sequence[Tensor | Quantized | Grouped], x: Tensor) -> list[Tensor]:
    """W x in float32 for weights "... d" of one kind and rows "r d": for each weight, its outputs "r o".

    For quantized weights, inputs are rounded. The error is at most 2^-16 of the largest input in a group of 64.
    """
    build.load_for(x, build.DECODE)
    values, scales = values_and_scales(weights)
    rest = x.float().contiguous(), torch.get_num_threads()
    if isinstance(weights[0], Quantized):  # a cast of the tree may have changed their dtype
        scales = [scale.float().contiguous() for scale in scales]
    kernels = torch.ops.llama_fn
    y = kernels.linear_integers(values, scales, *rest) if scales else kernels.linear_floats(values, *rest)
    return list(y.split([math.prod(weight.shape[:-1]) for weight in weights], -1))


def values_and_scales(weights: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The tensors that a kernel reads: the weights' values, and the scales of quantized weights (or an empty list)."""
    if all(isinstance(weight, Quantized | Grouped) for weight in weights):
        return [weight.values for weight in weights], [weight.scale for weight in weights]
    return list(weights), []


def _empty_floats(values: list[Tensor], x: Tensor, threads: int) -> Tensor:
    return x.new_empty((x.shape[0], sum(value.numel() // x.shape[-1] for value in values)))


def _empty_integers(values: list[Tensor], scales: list[Tensor], x: Tensor, threads: int) -> Tensor:
    numbers = sum(value.numel() * (2 if value.dtype == torch.uint8 else 1) for value in values)
    return x.new_empty((x.shape[0], numbers // x.shape[-1]))


define("linear_floats(Tensor[] values, Tensor x, int threads) -> Tensor", _empty_floats)
define("linear_integers(Tensor[] values, Tensor[] scales, Tensor x, int threads) -> Tensor", _empty_integers)
