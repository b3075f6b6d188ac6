"""Learning rates as functions of the number of steps taken."""

import math

import torch
from torch import Tensor

from llama_fn.ranges import integer, number
from llama_fn.training.optim import Schedule


def warmup_cosine(peak: float, warmup: int, steps: int, end: float = 0.0) -> Schedule:
    """From 0 up to `peak` in a straight line over `warmup` steps, then down to `end` at `steps` along half a cosine.

    (Loshchilov and Hutter 2017, "SGDR", eq. 5; Optax's `warmup_cosine_decay_schedule`.)
    Raises `ValueError` for a rate below 0 or not finite, and for a warmup that leaves no steps after it.
    """
    peak, end = number("warmup_cosine: peak", peak), number("warmup_cosine: end", end)
    warmup, steps = integer("warmup_cosine: warmup", warmup), integer("warmup_cosine: steps", steps)
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup_cosine: warmup ({warmup}) must lie in [0, steps), and steps is {steps}")

    def rate(count: Tensor) -> Tensor:
        count = count.float()
        done = ((count - warmup) / (steps - warmup)).clamp(0, 1)
        falling = end + (peak - end) * (1 + torch.cos(math.pi * done)) / 2
        return torch.where(count < warmup, peak * count / max(warmup, 1), falling)

    return rate
