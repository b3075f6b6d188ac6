"""`llama-fn report`: a page about training runs."""

from pathlib import Path
from typing import Annotated

import tyro

from llama_fn.checkpoint.atomic import replacing
from llama_fn.training.report import report as report_of


def report(runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")], *,
           out: Path = Path("report.html")) -> None:
    """Write one HTML page about a training run, or about several beside each other.

    The page holds the results, the curves, the samples and the plan of each run. It needs no network and no other file.
    A run may still be going on. The curves need matplotlib (pip install 'llama_fn[plot]').

    Args:
        runs: The folders of the runs.
        out: The file to write. An older one is replaced.
    """
    text = report_of(runs)
    with replacing(out) as beside:
        beside.write_text(text, encoding="utf-8")
    print(out)
