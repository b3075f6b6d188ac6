"""Rotary position embedding (Su et al. 2021, "RoFormer", eq. 15), on interleaved pairs, as Meta stores the weights.

Pair i of a head at position m is turned by the angle m * theta^(-2i/h). A dot product of two rotated vectors then
depends on the difference of their positions alone.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.config import RopeScaling
from llama_fn.shapes import typed


class Rotation(NamedTuple):
    """The cosines and sines of every position's angles, in float32."""

    cos: Float[Tensor, "*b t p"]
    sin: Float[Tensor, "*b t p"]


@typed
def rotation(positions: Int[Tensor, "*b t"], head_dim: int, theta: float,
             scaling: RopeScaling | None = None) -> Rotation:
    """Built from integers, in float32, whatever the model's dtype: a bfloat16 position of 257 would be 256."""
    angles = positions[..., None].float() * frequencies(head_dim, theta, scaling, positions.device)
    # As Meta's `freqs_cis`: inductor takes what is complex from eager kernels, once, and would else compute powers,
    # cosines and sines again in every layer, number by number (of a compiled gradient, a sixth of the time).
    turned = torch.polar(torch.ones_like(angles), angles)
    return Rotation(turned.real, turned.imag)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Float[Tensor, "p"]:
    """The angle of each pair at position 1, in radians."""
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    return scaled(1.0 / theta**exponents, scaling)


@typed
def scaled(frequencies: Float[Tensor, "p"], scaling: RopeScaling | None) -> Float[Tensor, "p"]:
    """The frequencies (in radians a token) for a longer context, by the two rules of `RopeScaling`."""
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # In the order of Meta's `apply_scaling`: a last bit more or less turns a pair by 1e-4 in 2000 tokens.
    turns = scaling.original_max_seq_len / (2 * math.pi / frequencies)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


@typed
def rotate(x: Float[Tensor, "*b t n h"], rotation: Rotation) -> Float[Tensor, "*b t n h"]:
    """Turn every pair (x[2i], x[2i+1]) of every head by its angle; computed in float32 at least, and cast back."""
    even, odd = rearrange(x, "... t n (p two) -> two ... t n p", two=2)
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return rearrange(turned, "... t n p two -> ... t n (p two)").to(x.dtype)
