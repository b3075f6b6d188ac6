"""Rotary position embedding, RoPE (Su et al. 2021, "RoFormer", eq. 15).

Each head is cut into pairs of neighbors, (x[2i], x[2i+1]), as Meta stores the weights. At position m, pair i is rotated
by the angle m * theta^(-2i/h). So the dot product of a query and a key depends on the difference of their positions.
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
    """The cosine and the sine of each pair's angle at each position, in float32."""

    cos: Float[Tensor, "*b t p"]
    sin: Float[Tensor, "*b t p"]


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Float[Tensor, "p"]:
    """The frequency of each pair, theta^(-2i/h), in radians per position."""
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    return scale_frequencies(1.0 / theta**exponents, scaling)


@typed
def scale_frequencies(frequencies: Float[Tensor, "p"], scaling: RopeScaling | None) -> Float[Tensor, "p"]:
    """The frequencies for a longer context, by one of the two rules that `RopeScaling` explains."""
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # The operations come in the order of Meta's `apply_scaling`: a difference in a frequency's last bit changes the
    # angle at position 2000 by 1e-4.
    turns = scaling.original_max_seq_len / (2 * math.pi / frequencies)  # of each pair, within the original context
    smooth = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


@typed
def rotation(positions: Int[Tensor, "*b t"], head_dim: int, theta: float,
             scaling: RopeScaling | None = None) -> Rotation:
    """The rotation of every pair at these positions.

    Positions are integers and angles float32, whatever the dtype of the model: in bfloat16, position 257 is 256.
    """
    angles = positions[..., None].float() * frequencies(head_dim, theta, scaling, positions.device)
    # Complex numbers, as Meta's `freqs_cis`, have `torch.compile` compute them once. Written with `cos` and `sin`, it
    # would compute them again in every layer, which takes a sixth of the time of a compiled gradient.
    unit = torch.polar(torch.ones_like(angles), angles)
    return Rotation(unit.real, unit.imag)


@typed
def rotate(x: Float[Tensor, "*b t n h"], rotation: Rotation) -> Float[Tensor, "*b t n h"]:
    """Rotate every pair of every head by its angle, in float32 at least, and cast back to the dtype of x."""
    even, odd = rearrange(x, "... t n (p two) -> two ... t n p", two=2)
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return rearrange(rotated, "... t n p two -> ... t n (p two)").to(x.dtype)
