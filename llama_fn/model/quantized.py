"""Weights in eight bits: leaves of the tree that take half the memory of bfloat16, and half the time to read."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from llama_fn.shapes import typed


class Quantized(NamedTuple):
    """W = scale * values: integers from -127 to 127, and of each output (the axes of `scale`) what they count in."""

    values: Int8[Tensor, "..."]
    scale: Float[Tensor, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of W."""
        return self.values.shape


@typed
def quantized(weight: Float[Tensor, "..."], outer: int) -> Quantized:
    """The nearest 8-bit weight: of each output, the first `outer` axes, the largest number becomes 127 or -127.

    The error of a number is at most half a step, scale / 2. Raises `ValueError` for numbers that are not finite.
    """
    exact = weight.float()
    largest = exact.flatten(outer).abs().amax(-1)
    if not largest.isfinite().all():
        raise ValueError("a weight is infinite or NaN and has no 8-bit form: is its file damaged?")
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (exact / scale.reshape(*scale.shape, *[1] * (weight.ndim - outer))).round()
    return Quantized(rounded.to(torch.int8), scale)


@typed
def dequantized(weight: Quantized, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
    """The W that a quantized weight stands for."""
    scale = weight.scale.reshape(*weight.scale.shape, *[1] * (weight.values.ndim - weight.scale.ndim))
    return (weight.values * scale).to(dtype)
