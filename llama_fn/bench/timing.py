"""Timing works against each other: in turn, so that a slow minute of the machine falls on all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

Figures = dict[str, str]


class Ratio(NamedTuple):
    """How many times longer one work takes than another: median and quartiles of the rounds' own ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.high > 1.5 * self.low:  # half of all rounds lie further apart than any difference worth telling
            return f"unclear: {self.low:.2f} to {self.high:.2f}"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def interleave(works: Mapping[str, Callable[[], Any]], rounds: int, what: str = "") -> dict[str, list[float]]:
    """The seconds of every work in every round; each goes twice before the first, to compile and to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with tqdm(total=(rounds + 2) * len(works), desc=what, unit="run", leave=False, disable=None) as bar:
        for i in range(-2, rounds):
            for name, work in works.items():
                begun = time.perf_counter()
                work()
                if i >= 0:
                    seconds[name].append(time.perf_counter() - begun)
                bar.update()
    return seconds


def ratio(over: list[float], under: list[float]) -> Ratio:
    """Of the works' seconds, round by round."""
    low, median, high = quartiles([a / b for a, b in zip(over, under, strict=True)])
    return Ratio(median, low, high)


def quartiles(values: list[float]) -> list[float]:
    """The first quartile, the median and the third."""
    return statistics.quantiles(values, n=4, method="inclusive")


def spread(values: list[float]) -> str:
    low, median, high = quartiles(values)
    return f"{median:.4g} ({low:.4g} to {high:.4g})"
