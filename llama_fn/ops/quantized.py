"""Weights in eight or four bits: leaves of the tree that take a half or a quarter of the memory of bfloat16."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from llama_fn.shapes import typed

GROUP = 64  # inputs that share a scale and a minimum, in four bits


class Quantized(NamedTuple):
    """W = scale * values: integers from -127 to 127, and of each output (the axes of `scale`) what they count in."""

    values: Int8[Tensor, "..."]
    scale: Float[Tensor, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W. If values and scale do not fit: both shapes around a 0, for the check of axes to report."""
        fits = self.values.shape[:self.scale.ndim] == self.scale.shape
        return self.values.shape if fits else (*self.values.shape, 0, *self.scale.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales."""
        return self.scale.dtype

    def linear(self, x: Tensor, inputs: int) -> Tensor:
        """W x."""
        return _multiplied(self, x, inputs)

    def flat(self) -> "Quantized":
        """As a matrix "o d"."""
        return Quantized(self.values.reshape(self.scale.numel(), -1), self.scale.flatten())


class Grouped(NamedTuple):
    """W = scale * n + minimum, with integers n from 0 to 15.

    Each group of 64 inputs of an output has a scale and a minimum, side by side in bfloat16, as in torch's own kernels.
    A byte holds two integers, the first in its lower half.
    """

    values: UInt8[Tensor, "..."]  # the last axis is half of W's
    scale: Float[Tensor, "... 2"]  # the axes of the outputs, groups, and the two numbers of each

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W. If values and scale do not fit: both shapes around a 0, for the check of axes to report."""
        shape, outer = (*self.values.shape[:-1], 2 * self.values.shape[-1]), self.scale.ndim - 2
        groups = -(-math.prod(shape[outer:]) // GROUP)
        fits = self.scale.shape == (*shape[:outer], groups, 2)
        return shape if fits else (*self.values.shape, 0, *self.scale.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales."""
        return self.scale.dtype

    def linear(self, x: Tensor, inputs: int) -> Tensor:
        """W x."""
        return _multiplied(self, x, inputs)

    def flat(self) -> "Grouped":
        """As a matrix "o d"."""
        return Grouped(self.values.reshape(self.scale.shape[:-2].numel(), -1), self.scale.flatten(0, -3))


@typed
def quantized(weight: Float[Tensor, "..."], outer: int) -> Quantized:
    """The nearest 8-bit weight: of each output, the first `outer` axes, the largest number becomes 127 or -127.

    The error of a number is at most half a step, scale / 2. Raises `ValueError` for numbers that are not finite.
    """
    exact = weight.float()
    largest = _finite(exact.flatten(outer).abs().amax(-1), "8-bit")
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (exact / scale.reshape(*scale.shape, *[1] * (weight.ndim - outer))).round()
    return Quantized(rounded.to(torch.int8), scale)


@typed
def grouped(weight: Float[Tensor, "..."], outer: int) -> Grouped:
    """The nearest 4-bit weight.

    In each group of `GROUP` inputs of an output the smallest number becomes 0 and the largest 15 (asymmetric, as
    `torchao`'s int4). The last group may be shorter.

    The error of a number is at most half a step, scale / 2, or, where that is more, what the minimum lost when it was
    rounded to bfloat16: 2^-8 of the smallest. (The scale's rounding moves the largest by 15 * 2^-8 of a step, no more.)
    Raises `ValueError` for numbers that are not finite, and for an odd last axis.
    """
    if weight.shape[-1] % 2:
        raise ValueError(f"4-bit weights lie in pairs, and the last axis of {list(weight.shape)} is odd; use int8")
    flat = weight.float().flatten(outer)
    missing = -flat.shape[-1] % GROUP
    padded = torch.cat([flat, flat[..., -1:].expand(*flat.shape[:-1], missing)], -1).unflatten(-1, (-1, GROUP))
    low, high = padded.aminmax(dim=-1)
    minimum = low.bfloat16()
    step = ((high - minimum.float()) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    scale = _finite(torch.stack([step, minimum], -1), "4-bit")
    n = ((padded - minimum.float()[..., None]) / step.float()[..., None]).round().clamp(0, 15).to(torch.uint8)
    n = n.flatten(-2)[..., :flat.shape[-1]].reshape(weight.shape)
    return Grouped(n[..., ::2] | n[..., 1::2] << 4, scale)


def has_own_dtypes(weight: Quantized | Grouped) -> bool:
    """Whether kernels may read the weight's memory: it has the dtypes that `quantized` and `grouped` give.

    The leaves of a tree that was cast to another dtype do not.
    """
    if isinstance(weight, Quantized):
        return weight.values.dtype == torch.int8
    return (weight.values.dtype == torch.uint8 and weight.scale.dtype == torch.bfloat16
            and weight.scale.is_contiguous())


@typed
def dequantized(weight: Quantized | Grouped, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
    """The W that a quantized weight stands for."""
    exact = torch.promote_types(dtype, torch.float32)
    if isinstance(weight, Quantized):
        scale = weight.scale.reshape(*weight.scale.shape, *[1] * (weight.values.ndim - weight.scale.ndim))
        return (weight.values.to(exact) * scale).to(dtype)
    n = torch.stack([weight.values & 15, weight.values >> 4], -1).flatten(weight.scale.ndim - 2)
    # The shorter last group has an expression of its own: one index of both, number // GROUP, is computed wrongly by
    # torch 2.13's compiler, which splits the loop into whole groups and leaves out the rest.
    whole, parts = n.shape[-1] // GROUP, []
    for some, groups in ((n[..., :whole * GROUP].unflatten(-1, (whole, GROUP)), slice(whole)),
                         (n[..., None, whole * GROUP:], slice(whole, None))):
        if 0 not in some.shape[-2:]:
            scale, minimum = (part[..., groups, None].to(exact) for part in weight.scale.unbind(-1))
            parts.append((some.to(exact) * scale + minimum).to(dtype).flatten(-2))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).reshape(weight.shape)


def _multiplied(weight: Quantized | Grouped, x: Tensor, inputs: int) -> Tensor:
    from llama_fn.ops.linear import quantized_linear  # whose kernels read weights of these two kinds

    return quantized_linear(weight, x, inputs)


def _finite(x: Tensor, kind: str) -> Tensor:
    if not x.isfinite().all():
        raise ValueError(f"a weight is infinite or NaN and has no {kind} form: is its file damaged?")
    return x
