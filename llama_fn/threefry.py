"""Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), and arithmetic on its words."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(key: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The block function: 20 rounds over the counter (x0, x1), the key added in after every four.

    In between, words lie in int32, where sums and shifts wrap as those of unsigned words do: half the memory.
    """
    k0, k1, x0, x1 = (x.to(torch.int32) for x in (key[..., 0], key[..., 1], x0, x1))
    schedule = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << r) | (x1 >> 32 - r & 2**r - 1))  # a shift to the right brings the sign with it
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + (schedule[(i + 2) % 3] + (i + 1))
    return x0.to(torch.int64) & MASK, x1.to(torch.int64) & MASK


def counters(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """0, 1, 2, ... in row-major order, as high and low words."""
    if any(n < 0 for n in shape):
        raise ValueError(f"random: a shape has no axis below 0, got {tuple(shape)}")
    count = torch.arange(math.prod(shape), device=device).reshape(tuple(shape))
    return count >> 32, count & MASK


def remainder(x: Tensor, span: int, width: int) -> Tensor:
    """Unsigned words modulo `span`, which is 2**width at most. Those of 64 bits lie in int64 as two's complement."""
    if span >> width:
        return x
    if width < 64:
        return x % span
    if span >> 63:  # a word is at most one span too large; comparison without signs is that with the first bit turned
        return torch.where((x ^ -2**63) >= signed(span ^ 2**63), x - signed(span), x)
    half = (x >> 1 & 2**63 - 1) // span * 2  # a quotient that is right, or too small by one
    rest = x - half * span
    return torch.where((rest < 0) | (rest >= span), rest - span, rest)


def signed(word: int) -> int:
    """The number in int64 that has the word's 64 bits."""
    return (word + 2**63) % 2**64 - 2**63
