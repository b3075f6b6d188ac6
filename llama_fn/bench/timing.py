"""Time several functions in turn, so that a slow minute of the machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

Figures = dict[str, str]


class Ratio(NamedTuple):
    """How many times as long one function takes as another: the median and the quartiles of the rounds' ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.high > 1.5 * self.low:  # the rounds differ too much for one number to stand for them
            return f"unclear: {self.low:.2f} to {self.high:.2f}"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def interleave(works: Mapping[str, Callable[[], Any]], rounds: int, what: str = "") -> dict[str, list[float]]:
    """The seconds that each function took in each round.

    Two rounds before the first are not counted: in them the functions compile and warm up. `what` is the label of the
    progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with tqdm(total=(rounds + 2) * len(works), desc=what, unit="run", leave=False, disable=None) as bar:
        for i in range(-2, rounds):
            for name, work in works.items():
                begin = time.perf_counter()
                work()
                if i >= 0:
                    seconds[name].append(time.perf_counter() - begin)
                bar.update()
    return seconds


def ratio(over: list[float], under: list[float]) -> Ratio:
    """The ratio of two functions' seconds, taken in each round."""
    low, median, high = quartiles([a / b for a, b in zip(over, under, strict=True)])
    return Ratio(median, low, high)


def quartiles(values: list[float]) -> list[float]:
    """The first quartile, the median and the third."""
    return statistics.quantiles(values, n=4, method="inclusive")


def spread(values: list[float]) -> str:
    """The median of some values, with their first and third quartile."""
    low, median, high = quartiles(values)
    return f"{median:.4g} ({low:.4g} to {high:.4g})"
