"""Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), and arithmetic on its words."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(key: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The block function of Threefry: two random words for each counter (x0, x1), in 20 rounds.

    The key, whose last axis has its two words, is added after every four rounds. All words lie in int64, in [0, 2**32).
    In between they lie in int32, where sums and shifts wrap like those of unsigned words and take half the memory.

    >>> x0, x1 = lf.random.threefry2x32(key, torch.tensor(0), torch.tensor(1))
    """
    k0, k1, x0, x1 = (x.to(torch.int32) for x in (key[..., 0], key[..., 1], x0, x1))
    schedule = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << r) | (x1 >> 32 - r & 2**r - 1))  # the mask removes the sign, which a right shift repeats
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + (schedule[(i + 2) % 3] + (i + 1))
    return x0.to(torch.int64) & MASK, x1.to(torch.int64) & MASK


def counters(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The counters 0, 1, 2, ... in row-major order, as high and low words. Raises `ValueError` for a negative size."""
    if any(n < 0 for n in shape):
        raise ValueError(f"random: a shape has no axis below 0, got {tuple(shape)}")
    count = torch.arange(math.prod(shape), device=device).reshape(tuple(shape))
    return count >> 32, count & MASK


def remainder(x: Tensor, span: int, width: int) -> Tensor:
    """Unsigned words modulo `span`, which is at most 2**width. Words of 64 bits lie in int64 as two's complement."""
    if span >> width:
        return x
    if width < 64:
        return x % span
    if span >> 63:  # A word is less than two spans. Unsigned words compare as signed ones with the first bit flipped.
        return torch.where((x ^ -2**63) >= signed(span ^ 2**63), x - signed(span), x)
    half = (x >> 1 & 2**63 - 1) // span * 2  # the quotient, or one less
    rest = x - half * span
    return torch.where((rest < 0) | (rest >= span), rest - span, rest)


def long_remainder(high: Tensor, low: Tensor, span: int, width: int) -> Tensor:
    """(high * 2**width + low) modulo `span`, for unsigned words of `width` bits.

    As JAX's `randint` has it, the word `low` counts alone where `span` is above 2**(width / 2).
    """
    wrapped = (2 ** (width // 2) % span) ** 2 % 2**width % span  # 2**width % span, but for spans above 2**(width / 2)
    total = remainder(high, span, width) * signed(wrapped) + remainder(low, span, width)  # modulo 2**64
    return remainder(total if width == 64 else total & MASK, span, width)


def signed(word: int) -> int:
    """The number in int64 that has the 64 bits of the word."""
    return (word + 2**63) % 2**64 - 2**63
