"""A picture of a training run's losses."""

import os

from llama_fn.checkpoint.atomic import replacing
from llama_fn.text import json_lines


def plot_losses(metrics: str | os.PathLike, png: str | os.PathLike) -> bool:
    """Draw the losses in a ``metrics.jsonl`` over the steps, and the lowest possible loss if the file has it.

    Returns False, and draws nothing, if matplotlib is not installed. Raises `ValueError` for a file that is not JSON,
    and `OSError` that names the picture's file if it cannot be written.

    Example: ``plot_losses("run/metrics.jsonl", "run/loss.png")``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    records = [record for _, record in json_lines(metrics)]
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["step"], r["valid_loss"]) for r in records if "valid_loss" in r]
    floors = [r["floor"] for r in records if "floor" in r]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)", yscale="log")
    axes.plot(*zip(*training, strict=True), linewidth=0.6, color="tab:blue", label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", markersize=4, color="tab:orange",
                  label=f"validation, {validation[-1][1]:.4f} at the end")
    if floors:
        axes.axhline(floors[-1], color="black", linestyle="--", label=f"the grammar's entropy, {floors[-1]:.4f}")
    if axes.lines:  # a finished run that is resumed without its metrics has no lines
        axes.legend()
    axes.grid(True, which="both", alpha=0.2)
    with replacing(png) as beside:
        figure.savefig(beside, dpi=120, format="png")
    return True
