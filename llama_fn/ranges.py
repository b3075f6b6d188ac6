"""What counts as a number, and whether it lies in a range. `typed` and every function with settings ask here.

As PEP 484 has it, an int is a number wherever a float is meant. NumPy's scalars are numbers. A bool is none.
"""

import math
from typing import Any

import numpy as np
import torch

INTEGERS = (int, np.integer, torch.SymInt)  # the last stands for a size that may change, in a traced function

def is_integer(value: Any) -> bool:
    """Whether the value is an integer, Python's or NumPy's, and no bool."""
    return isinstance(value, INTEGERS) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether the value is an integer or a float, Python's or NumPy's, and no bool. NaN and infinity are numbers here.
    """
    return is_integer(value) or isinstance(value, (float, np.floating))


def integer(name: str, value: Any, least: int | None = None) -> int:
    """The value as Python's int. Raises `ValueError` for what is no integer, and for one below `least`."""
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value) if isinstance(value, np.integer) else value


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False,
           below: bool | None = None) -> float:
    """The value as Python's float.

    Raises `ValueError` for what is no number, for NaN, and for a number outside [low, high]. `above` leaves out `low`,
    `below` leaves out `high`; None leaves out an infinite one.
    """
    below = math.isinf(high) if below is None else below
    if is_number(value):
        try:
            exact = float(value)
        except OverflowError:  # an integer of more than 308 digits
            exact = math.inf if value > 0 else -math.inf
        if low <= exact <= high and not (above and exact == low) and not (below and exact == high):
            return exact
    interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
    raise ValueError(f"{name} must lie in {interval}, got {value!r}")
