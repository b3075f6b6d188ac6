"""Pictures of training runs: loss, learning rate, gradient norm and throughput over the steps, drawn by matplotlib."""

import io
import os
from collections.abc import Sequence
from typing import Any

from llama_fn.checkpoint.atomic import replacing
from llama_fn.training.measurements import curve, medians, read_measurements, thinned

PANELS = (("loss", "loss (nats a token)", "log"), ("learning_rate", "learning rate", "linear"),
          ("grad_norm", "gradient norm", "log"), ("tokens_per_second", "tokens a second", "linear"))
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
INSTALL = "pip install 'llama_fn[plot]'"


def color_of(number: int) -> str:
    """The color of run ``number`` in the pictures of several runs; after eight runs the colors repeat."""
    return COLORS[number % len(COLORS)]


def plot_curves(metrics: str | os.PathLike, png: str | os.PathLike) -> bool:
    """Draw the curves of a ``metrics.jsonl``, and write the picture as PNG.

    Returns False, and draws nothing, if matplotlib is not installed. Raises `OSError` that names the picture's file if
    it cannot be written.

    Example: ``plot_curves("run/metrics.jsonl", "run/curves.png")``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    measurements, _ = read_measurements(metrics)
    figure = Figure(figsize=(11, 7), layout="constrained")
    _draw(figure, [measurements])
    with replacing(png) as beside:
        figure.savefig(beside, dpi=120, format="png")
    return True


def curves_as_svg(runs: Sequence[Sequence[dict]]) -> str:
    """The curves of several runs in one picture, as SVG. The same runs give the same text.

    The picture holds numbers and fixed words alone; names of runs belong beside it. Raises `ValueError` if matplotlib
    is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f"curves need matplotlib, which is not installed ({INSTALL})") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    _draw(figure, runs)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llama_fn"}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue()


def _draw(figure: Any, runs: Sequence[Sequence[dict]]) -> None:
    """One panel for each quantity, with the curves of all runs."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axes, (name, label, scale) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        axes.set(xlabel="step", ylabel=label)
        for number, measurements in enumerate(runs):
            _draw_run(axes, name, measurements, color_of(number), alone=len(runs) == 1)
        values = [value for line in axes.lines for value in line.get_ydata()]
        if not values:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="gray")
        if scale == "log" and values and min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_minor_formatter(plain if max(values) < 20 * min(values) else NullFormatter())
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(True, which="both", alpha=0.2)


def _draw_run(axes: Any, name: str, measurements: Sequence[dict], color: str, alone: bool) -> None:
    """The curve of a quantity of one run; for the loss, also that on held-out texts and the lowest possible one.

    The curve of many steps is faint, and its medians lie on it. The lines of a run that is ``alone`` have labels.
    """
    points = curve(measurements, name)
    middle = medians(points) if name != "learning_rate" else []
    if points:
        axes.plot(*zip(*thinned(points), strict=True), linewidth=0.8, color=color, alpha=0.3 if middle else 1.0,
                  marker="." if len(points) == 1 else None, label="training" if alone and name == "loss" else None)
    if middle:
        axes.plot(*zip(*middle, strict=True), linewidth=1.2, color=color)
    if name != "loss":
        return
    if valid := thinned(curve(measurements, "valid_loss")):
        axes.plot(*zip(*valid, strict=True), "o-", markersize=3, linewidth=1.2, color="black" if alone else color,
                  label=f"validation, {valid[-1][1]:.5g} at the end" if alone else None)
    if floor := curve(measurements, "floor"):
        axes.axhline(floor[-1][1], color="black" if alone else color, linestyle="--", linewidth=0.8,
                     label=f"lowest possible, {floor[-1][1]:.5g}" if alone else None)
