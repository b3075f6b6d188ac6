"""What counts as a number, and whether it lies in a range; `typed` and every function with settings use these rules.

As in PEP 484, an integer is accepted as a float. NumPy's scalars are numbers. A bool is not a number.
"""

import math
from typing import Any

import numpy as np
import torch

INTEGERS = (int, np.integer, torch.SymInt)  # the last stands for a size that may change, in a traced function

def is_integer(value: Any) -> bool:
    """Whether the value is an integer of Python or NumPy, and not a bool."""
    return isinstance(value, INTEGERS) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether the value is an integer or a float of Python or NumPy, NaN and infinity included, and not a bool."""
    return is_integer(value) or isinstance(value, (float, np.floating))


def integer(name: str, value: Any, least: int | None = None) -> int:
    """The value as an integer of Python. Raises `ValueError` for anything else, and for an integer below `least`."""
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value) if isinstance(value, np.integer) else value


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False,
           below: bool | None = None) -> float:
    """The value as a float of Python.

    The value must lie in [low, high]; `above` leaves out `low` itself, and `below` leaves out `high`. `below` None
    leaves out `high` if it is infinite. Raises `ValueError` for other values, among them NaN.
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
