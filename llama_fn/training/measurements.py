"""Reads the measurements of a run, and gives their curves and final figures.

A measurement is a dictionary with "step", a line of ``metrics.jsonl``. Every other value may be missing, and may be
anything that JSON can hold: the file may come from another program or from another machine.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median, median_low
from typing import Any

from llama_fn.ranges import is_integer, is_number
from llama_fn.text import characters, parse

Points = list[tuple[int, float]]  # steps and values


def _last(values: Sequence[float]) -> float:
    return values[-1]


def _mean_of_last(values: Sequence[float]) -> float:
    """The mean of the last 100 values. They are divided before they are added, so that the sum does not overflow."""
    some = values[-100:]
    return math.fsum(value / len(some) for value in some)


def _gib(values: Sequence[float]) -> float:
    return max(values) / 2**30


SUMMARIES: tuple[tuple[str, str, Callable[[Sequence[float]], float], str], ...] = (
    ("parameters", "parameters", _last, "{:,.0f}"),
    ("tokens to learn from", "training_tokens", _last, "{:,.0f}"),
    ("training loss, mean of the last 100 steps", "loss", _mean_of_last, "{:.4f}"),
    ("validation loss at the end", "valid_loss", _last, "{:.4f}"),
    ("lowest validation loss", "valid_loss", min, "{:.4f}"),
    ("lowest possible loss", "floor", _last, "{:.4f}"),
    ("tokens a second, median", "tokens_per_second", median, "{:,.0f}"),
    ("TFLOP/s, median", "tflops", median, "{:.3g}"),
    ("MFU, median", "mfu", median, "{:.1%}"),
    ("largest memory, GiB", "memory", _gib, "{:.2f}"),
    ("largest memory of the GPU, GiB", "gpu_memory", _gib, "{:.2f}"))


def read_measurements(path: str | os.PathLike) -> tuple[list[dict], int]:
    """The measurements in a ``metrics.jsonl``, and the number of lines that hold none.

    What stands after the last line end is left out and is not counted: a run may be writing it now.
    """
    *lines, _ = Path(path).read_bytes().split(b"\n")
    measurements, unreadable = [], 0
    for number, line in enumerate(lines, 1):
        try:
            text = characters(line, "", begins=number == 1)
            value = parse(text, "") if text.strip() else None
        except ValueError:
            unreadable += 1
            continue
        if isinstance(value, dict) and is_integer(value.get("step")) and 0 <= value["step"] < 2**53:
            measurements.append(value)
        else:
            unreadable += bool(text.strip())
    return measurements, unreadable


def finite(value: Any) -> float | None:
    """The value as a float; None for everything that is not a finite number."""
    try:
        return float(value) if is_number(value) and math.isfinite(value) else None
    except OverflowError:  # an integer of more than 308 digits
        return None


def curve(measurements: Iterable[dict], name: str) -> Points:
    """The steps and values of one quantity, in the order of the steps.

    If a step was measured twice, the later measurement counts. Values that are not finite numbers are left out.
    """
    last = {record["step"]: finite(record[name]) for record in measurements if name in record}
    return [(step, value) for step, value in sorted(last.items()) if value is not None]


def thinned(points: Points, bins: int = 500) -> Points:
    """At most ``2 * bins`` points and the two ends, for a picture that looks like one of all points.

    The points are cut into bins of equally many, and the lowest and the highest of each bin are kept.
    """
    if len(points) <= 2 * bins:
        return points
    kept = {0, len(points) - 1}
    for i in range(bins):
        part = range(len(points) * i // bins, len(points) * (i + 1) // bins)
        kept |= {min(part, key=lambda at: points[at][1]), max(part, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def medians(points: Points, bins: int = 100) -> Points:
    """The medians of steps and values in bins of equally many points; no points if a bin would hold fewer than two."""
    if len(points) < 2 * bins:
        return []
    parts = [points[len(points) * i // bins:len(points) * (i + 1) // bins] for i in range(bins)]
    return [(median_low(step for step, _ in part), median(value for _, value in part)) for part in parts]


def seconds_spent(measurements: Iterable[dict]) -> float:
    """The seconds that a run has taken, in all its sessions.

    "seconds" goes on counting when a run is resumed. In files of earlier versions it began again at 0, so a value that
    is lower than the one before it begins a new session.
    """
    total = before = 0.0
    for record in measurements:
        if (seconds := finite(record.get("seconds"))) is not None:
            total += seconds - before if seconds >= before else seconds
            before = seconds
    return total


def seconds_left(spent: float, taken: int, left: int) -> float | None:
    """The seconds for ``left`` more steps, if ``taken`` steps took ``spent`` seconds; None if no step was taken."""
    return spent / taken * left if taken else None


def final_figures(measurements: Sequence[dict], unreadable: int = 0) -> dict[str, str]:
    """The figures of a run as texts, by their names. A figure that the measurements do not give is not there."""
    curves = {name: curve(measurements, name) for name in ("steps", *(field for _, field, _, _ in SUMMARIES))}
    values = {name: [value for _, value in points] for name, points in curves.items() if points}
    taken = max((record["step"] for record in measurements), default=0)
    figures = {"steps": f"{taken:,}" + (f" of {values['steps'][-1]:,.0f}" if "steps" in values else "")}
    for name, field, measure, form in SUMMARIES:
        if field in values:
            figures[name] = form.format(measure(values[field]))
    if spent := seconds_spent(measurements):
        figures["time"] = clock(spent)
    if skipped := sum("loss" in record and finite(record["loss"]) is None for record in measurements):
        figures["steps without a finite loss"] = f"{skipped:,}"
    if unreadable:
        figures["lines that cannot be read"] = f"{unreadable:,}"
    return figures


def clock(seconds: float) -> str:
    """A time as hours, minutes and seconds: 1:02:03, or 2:03 if it is below one hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
