"""Learning rates as functions of the number of steps taken, a tensor or Python's int."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llama_fn.ranges import integer, number

Schedule = Callable[[Tensor], Tensor]  # from the number of steps taken to a learning rate


def warmup_cosine(peak: float, warmup: int, steps: int, end: float = 0.0) -> Callable[[Tensor | int], Tensor]:
    """From 0 up to `peak` in a straight line over `warmup` steps, then down to `end` at `steps` along half a cosine.

    (Loshchilov and Hutter 2017, "SGDR", eq. 5; Optax's ``warmup_cosine_decay_schedule``.)
    Raises `ValueError` for a rate below 0 or not finite, and for a warmup that leaves no steps after it.

    >>> schedule = lf.optim.warmup_cosine(3e-4, 100, 2000)
    """
    peak, warmup, steps, end = _checked("warmup_cosine", peak, warmup, steps, end)

    def rate(count: Tensor | int) -> Tensor:
        count = torch.as_tensor(count).float()
        done = ((count - warmup) / (steps - warmup)).clamp(0, 1)
        falling = end + (peak - end) * (1 + torch.cos(math.pi * done)) / 2
        return torch.where(count < warmup, peak * count / max(warmup, 1), falling)

    return rate


def warmup_linear(peak: float, warmup: int, steps: int, end: float = 0.0) -> Callable[[Tensor | int], Tensor]:
    """From 0 up to `peak` in a straight line over `warmup` steps, then down to `end` at `steps` in another one.

    (Optax's ``linear_schedule``, twice joined; transformers' ``get_linear_schedule_with_warmup``.)
    Raises `ValueError` for a rate below 0 or not finite, and for a warmup that leaves no steps after it.

    >>> schedule = lf.optim.warmup_linear(3e-4, 100, 2000)
    """
    peak, warmup, steps, end = _checked("warmup_linear", peak, warmup, steps, end)

    def rate(count: Tensor | int) -> Tensor:
        count = torch.as_tensor(count).float()
        done = ((count - warmup) / (steps - warmup)).clamp(0, 1)
        return torch.where(count < warmup, peak * count / max(warmup, 1), peak + (end - peak) * done)

    return rate


def warmup_stable_decay(peak: float, warmup: int, decay: int, steps: int,
                        end: float = 0.0) -> Callable[[Tensor | int], Tensor]:
    """From 0 up to `peak` over `warmup` steps, constant, and in the last `decay` of `steps` down to `end`.

    Both in straight lines. A run can be continued from the state before the decay, whatever its number of steps
    (Hu et al. 2024, "MiniCPM", section 4.2; Haegele et al. 2024). Raises `ValueError` for a rate below 0 or not finite,
    and for a decay of no steps or of more than come after the warmup.

    >>> schedule = lf.optim.warmup_stable_decay(3e-4, 100, 400, 2000)
    """
    peak, warmup, steps, end = _checked("warmup_stable_decay", peak, warmup, steps, end)
    decay = integer("warmup_stable_decay: decay", decay)
    if not 0 < decay <= steps - warmup:
        raise ValueError(f"warmup_stable_decay: decay ({decay}) must lie in (0, steps - warmup], and that is "
                         f"{steps - warmup}")

    def rate(count: Tensor | int) -> Tensor:
        count = torch.as_tensor(count).float()
        done = ((count - (steps - decay)) / decay).clamp(0, 1)
        return torch.where(count < warmup, peak * count / max(warmup, 1), peak + (end - peak) * done)

    return rate


def _checked(name: str, peak: float, warmup: int, steps: int, end: float) -> tuple[float, int, int, float]:
    """The settings as numbers, if each lies in its range."""
    peak, end = number(f"{name}: peak", peak), number(f"{name}: end", end)
    warmup, steps = integer(f"{name}: warmup", warmup), integer(f"{name}: steps", steps)
    if not 0 <= warmup < steps:
        raise ValueError(f"{name}: warmup ({warmup}) must lie in [0, steps), and steps is {steps}")
    return peak, warmup, steps, end
