"""`report`: one HTML page about a training run, or about several beside each other.

The page needs nothing else: no network, no script, no other file. The texts and names of a run are not trusted. The
page is built as a tree of elements, so every text in it is escaped when the tree is written.
"""

import json
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from llama_fn.text import read_json, visible
from llama_fn.training.curve import color_of, curves_as_svg
from llama_fn.training.manifest import MANIFEST
from llama_fn.training.measurements import final_figures, read_measurements
from llama_fn.training.record import METRICS

NOT_OF_THE_PLAN = ("texts", "sha256")  # digests; long, and of no use to a reader
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser loads nothing and runs no script
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px; margin: 2em auto;
  padding: 0 1em; }
section { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 0.2em 1.5em 0.2em 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { font-weight: 600; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tr.differs td { background: #fff3cd; }
figure { margin: 0; }
svg { width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; min-width: 15em; unicode-bidi: isolate; }
.prompt { color: #666; }
.swatch { display: inline-block; width: 1em; height: 1em; margin-right: 0.4em; vertical-align: -0.1em; }
"""


class Run(NamedTuple):
    """What the page shows of one run: its name, its plan, its measurements, and how many lines hold none."""

    name: str
    plan: dict[str, Any]
    measurements: list[dict]
    unreadable: int


def read_run(folder: str | os.PathLike, name: str | None = None) -> Run:
    """Read the run in a folder.

    Raises `FileNotFoundError` for a folder without ``metrics.jsonl``, and `ValueError` for a damaged ``run.json``.
    """
    folder = Path(folder)
    if not (folder / METRICS).is_file():
        raise FileNotFoundError(f"{folder}: not the folder of a training run: it has no {METRICS}")
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / MANIFEST}: not what a training run writes there")
    plan = {key: value for key, value in manifest.items() if key not in NOT_OF_THE_PLAN}
    return Run(folder.resolve().name if name is None else name, plan, *read_measurements(folder / METRICS))


def report(folders: Sequence[str | os.PathLike]) -> str:
    """The page about the runs in these folders, in HTML.

    Runs are named by their folders, or by their whole paths if two folders have the same name. Raises `ValueError`
    without a folder or without matplotlib, and the errors of `read_run`.

    Example: ``Path("report.html").write_text(report(["run", "other-run"]), encoding="utf-8")``.
    """
    if not folders:
        raise ValueError("report: at least one folder is needed")
    names = [Path(folder).resolve().name for folder in folders]
    if len({*names}) < len(names):
        names = [os.fspath(folder) for folder in folders]
    return page([read_run(folder, name) for folder, name in zip(folders, names, strict=True)])


def page(runs: Sequence[Run]) -> str:
    """The page about these runs, in HTML. The same runs give the same page."""
    root = Element("html", lang="en")
    head, body = SubElement(root, "head"), SubElement(root, "body")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": POLICY})
    SubElement(head, "meta", name="viewport", content="width=device-width")
    _text(head, "title", "Training: " + ", ".join(run.name for run in runs))
    SubElement(head, "style").text = STYLE
    _text(body, "h1", "Training run" if len(runs) == 1 else f"{len(runs)} training runs")

    figures = [final_figures(run.measurements, run.unreadable) for run in runs]
    _table(_section(body, "Results"), runs, figures, mark=False)
    curves = _section(body, "Curves")
    figure = SubElement(curves, "figure")
    figure.append(_svg(curves_as_svg([run.measurements for run in runs])))
    _text(figure, "figcaption", "Faint: each step. Solid: the median of every hundredth of the steps. With dots: the "
          "validation loss. Dashed: the lowest possible loss.")
    _samples(body, runs)
    if any(run.plan for run in runs):
        _table(_section(body, "Plan"), runs, [{key: _value(value) for key, value in run.plan.items()} for run in runs],
               mark=len(runs) > 1)
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def _table(parent: Element, runs: Sequence[Run], columns: Sequence[dict[str, str]], mark: bool) -> None:
    """A table with a column for each run. ``mark`` highlights the rows in which runs differ."""
    table = SubElement(parent, "table")
    _header(SubElement(SubElement(table, "thead"), "tr"), runs)
    rows = SubElement(table, "tbody")
    for name in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(name, "") for column in columns]
        row = SubElement(rows, "tr", {"class": "differs"} if mark and len({*values}) > 1 else {})
        _text(row, "th", name, scope="row")
        for value in values:
            _text(row, "td", value)


def _header(row: Element, runs: Sequence[Run]) -> None:
    """The names of the runs, each with its color in the picture."""
    SubElement(row, "td")
    for number, run in enumerate(runs):
        cell = SubElement(row, "th", scope="col")
        SubElement(cell, "span", {"class": "swatch", "style": f"background: {color_of(number)}"})
        _text(cell, "bdi", run.name)


def _samples(body: Element, runs: Sequence[Run]) -> None:
    """The sampled texts, a row for each step and a column for each run; the newest step comes first."""
    texts = sorted(((record["step"], number, record) for number, run in enumerate(runs) for record in run.measurements
                    if isinstance(record.get("sample"), str)), key=lambda text: (-text[0], text[1]))
    if not texts:
        return
    table = SubElement(_section(body, "Samples"), "table")
    _header(SubElement(SubElement(table, "thead"), "tr"), runs)
    rows = SubElement(table, "tbody")
    for step, group in groupby(texts, key=lambda text: text[0]):
        row = SubElement(rows, "tr")
        _text(row, "th", f"step {step:,}", scope="row")
        cells = [SubElement(row, "td") for _ in runs]
        for _, number, record in group:
            block = SubElement(cells[number], "pre")
            prompt = record.get("prompt")
            _text(block, "span", prompt if isinstance(prompt, str) else "", **{"class": "prompt"})
            _text(block, "span", record["sample"])


def _section(body: Element, title: str) -> Element:
    section = SubElement(body, "section")
    _text(section, "h2", title)
    return section


def _text(parent: Element, tag: str, text: str, **attributes: str) -> None:
    """Append an element with a text, in which control characters are visible."""
    SubElement(parent, tag, attributes).text = visible(text)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _svg(text: str) -> Element:
    """The picture as an element of HTML, where tags and attributes have no namespaces."""
    svg = ElementTree.fromstring(text)
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    svg.attrib |= {"role": "img", "aria-label": "The curves of the runs over the steps"}
    return svg
