"""Pearson's chi-square test: do counts look like their probabilities?"""

import torch
from torch import Tensor


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """The probability of counts at least as far off; tests ask for 1e-6, so that one run in a million lies."""
    expected = counts.sum() * probabilities.double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()
