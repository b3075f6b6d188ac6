"""The loss curve of a run as a picture."""

import os

from llama_fn.checkpoint.atomic import replacing
from llama_fn.text import json_lines


def plot_losses(metrics: str | os.PathLike, png: str | os.PathLike) -> bool:
    """Draw the losses of a `metrics.jsonl`, and the floor if it holds one; False if matplotlib is not installed."""
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
    if axes.lines:  # a run that goes on at its end, without its metrics, has none
        axes.legend()
    axes.grid(True, which="both", alpha=0.2)
    with replacing(png) as beside:
        figure.savefig(beside, dpi=120, format="png")
    return True
