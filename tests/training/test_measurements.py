"""What is read from a run's measurements, whatever they hold: curves, figures, and a page in which no text is code."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_fn.training import curve as curves
from llama_fn.training import report as pages
from llama_fn.training.measurements import (
    curve,
    final_figures,
    finite,
    medians,
    read_measurements,
    seconds_left,
    seconds_spent,
    thinned,
)
from llama_fn.training.report import Run, page, read_run, report

NAMES = ("loss", "valid_loss", "floor", "grad_norm", "learning_rate", "tokens_per_second", "tflops", "mfu", "memory",
         "gpu_memory", "seconds", "steps", "parameters", "training_tokens")
HOSTILE = ["<script>alert(1)</script>", "</pre></td><img src=x onerror=alert(1)>", "\"' onload=alert(1) x='", "]]>",
           "<!--", "&lt;&amp;&#60;", "\x00\x1b[31m\u202e\ud800\ufffe", "$x_$ \\frac{1}{2}", "</style>", "a" * 3000, ""]
texts = st.sampled_from(HOSTILE) | st.text(max_size=20)
values = st.one_of(st.floats(), st.floats(1e-3, 1e3), st.integers(-10**400, 10**400), st.none(), st.booleans(), texts,
                   st.just([1]), st.just({"loss": 1}))
records = st.builds(lambda step, numbers, words: {"step": step, **numbers, **words}, st.integers(0, 30),
                    st.dictionaries(st.sampled_from(NAMES), values, max_size=6),
                    st.dictionaries(st.sampled_from(("sample", "prompt", "other")), texts))
plans = st.dictionaries(texts, values | texts, max_size=4)
runs = st.builds(Run, texts, plans, st.lists(records, max_size=12), st.integers(0, 3))
one_curve = st.lists(st.builds(lambda step, value: {"step": step, "loss": value}, st.integers(0, 4),
                               st.integers(1, 9) | values), max_size=12)
points = st.lists(st.integers(-9, 9) | st.floats(-1e9, 1e9), max_size=60).map(lambda values: list(enumerate(values, 7)))


def written(path: Path, measurements: list[dict]) -> bytes:
    data = "".join(json.dumps(record) + "\n" for record in measurements).encode()
    path.write_bytes(data)
    return data


def is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


# --- reading

@given(st.lists(records, max_size=6), st.data())
def test_a_file_that_is_cut_anywhere_gives_the_measurements_before_the_cut(tmp_path_factory, measurements, data):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    whole = written(path, measurements)
    assert repr(read_measurements(path)) == repr((measurements, 0))  # NaN is not equal to itself
    path.write_bytes(cut := whole[:data.draw(st.integers(0, len(whole)))])
    assert repr(read_measurements(path)) == repr((measurements[:cut.count(b"\n")], 0))


@pytest.mark.parametrize("line", [b"\xff\xfe", b"{", b"[1]", b"1", b'{"loss": 1}', b'{"step": "1"}', b'{"step": true}',
                                  b'{"step": -1}', b'{"step": 1e3}', b'{"step": 1, "step": 2}', b"[" * 99999,
                                  b'{"step": 99999999999999999999}', b"\0"])
def test_a_line_that_is_no_measurement_is_counted_and_the_others_are_read(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n\n{"step": 2}\r\n')
    assert read_measurements(tmp_path / "metrics.jsonl") == ([{"step": 1}, {"step": 2}], 1)


# --- curves and figures

@given(one_curve)
@example([{"step": 2, "loss": 1.0}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 3.0}, {"step": 1}])
@example([{"step": 2, "loss": 1.0}, {"step": 2, "loss": math.nan}])
def test_a_curve_has_the_last_finite_value_of_each_step_in_order(measurements):
    points = curve(measurements, "loss")
    last: dict[int, object] = {}
    for record in measurements:
        if "loss" in record:
            last[record["step"]] = record["loss"]
    assert points == [(step, float(last[step])) for step in sorted(last) if is_finite(last[step])]


@given(points, st.integers(1, 6))
@example([(step, value) for step, value in enumerate([0, 1, 5, 1, 0, 1, 0, -7, 1, 0, 1, 3, 2])], 2)
def test_a_thinned_curve_is_part_of_it_and_keeps_the_ends_and_extremes(points, bins):
    kept = thinned(points, bins)
    assert len(kept) <= 2 * bins + 2 and [point for point in points if point in kept] == kept
    if points:
        assert {kept[0], kept[-1]} == {points[0], points[-1]}
        assert {min(y for _, y in kept), max(y for _, y in kept)} == {min(y for _, y in points),
                                                                     max(y for _, y in points)}


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_half_of_a_bin_lies_on_each_side_of_its_median(bins, size, data):
    values = data.draw(st.lists(st.floats(-1e9, 1e9), min_size=bins * size, max_size=bins * size, unique=True))
    middle = medians(points := list(enumerate(values, 7)), bins)
    assert len(middle) == (bins if size > 1 else 0)
    for i, (step, value) in enumerate(middle):
        part = points[i * size:(i + 1) * size]
        assert part[0][0] <= step <= part[-1][0]
        assert 2 * sum(y <= value for _, y in part) >= size <= 2 * sum(y >= value for _, y in part)


@given(st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=5).map(sorted), max_size=4))
def test_the_time_of_sessions_adds_up(sessions):
    whole, begun = [], 0
    for session in sessions:  # each goes on where the one before ended
        whole += [{"step": 1, "seconds": begun + seconds} for seconds in session]
        begun += session[-1]
    assert seconds_spent(whole) == begun
    assert seconds_spent([{"step": 1, "seconds": 5.0}, {"step": 2}, {"step": 3, "seconds": 2.0}]) == 7  # from 0 again


@given(st.integers(1, 50), st.integers(0, 50), st.floats(0.01, 100))
def test_the_time_left_is_that_of_steps_as_long_as_those_so_far(taken, left, each):
    assert seconds_left(taken * each, taken, left) == pytest.approx(left * each)
    assert seconds_left(0.0, 0, left) is None


@given(st.lists(records, max_size=12), st.integers(0, 2))
@example([{"step": 1, "loss": 1.5e308}, {"step": 2, "loss": 1.5e308}], 0)
def test_figures_are_finite_whatever_the_measurements_hold(measurements, unreadable):
    figures = final_figures(measurements, unreadable)
    assert not [text for text in figures.values() if re.search(r"nan|inf|None", text)]
    assert ("lines that cannot be read" in figures) == (unreadable > 0)
    skipped = sum("loss" in record and not is_finite(record["loss"]) for record in measurements)
    assert figures.get("steps without a finite loss", "0") == str(skipped)


def test_figures_are_those_of_the_run():
    steps = [{"step": i, "loss": 8 / i, "tokens_per_second": i * 100, "mfu": 0.01 * i, "memory": i * 2**30,
              "seconds": i * 1800} for i in (1, 2, 4)]
    first = {"step": 0, "steps": 4, "parameters": 1234, "training_tokens": 98765}
    evaluations = [{"step": 2, "valid_loss": 3.0, "floor": 1.5}, {"step": 4, "valid_loss": 3.5, "floor": 1.5}]
    assert final_figures([first, *steps, *evaluations]) == {
        "steps": "4 of 4", "parameters": "1,234", "tokens to learn from": "98,765",
        "training loss, mean of the last 100 steps": "4.6667", "validation loss at the end": "3.5000",
        "lowest validation loss": "3.0000", "lowest possible loss": "1.5000", "tokens a second, median": "200",
        "MFU, median": "2.0%", "largest memory, GiB": "4.00", "time": "2:00:00"}


# --- the page

class Parsed(HTMLParser):
    """The elements of a page, and all of its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.others: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        self.others.append(data)

    unknown_decl = handle_pi = handle_comment


def harmless(run: Run) -> Run:
    """The run with a harmless text in the place of each text."""
    def changed(value):
        return "x" if isinstance(value, str) else value

    return Run("x", {f"x{i}": changed(value) for i, value in enumerate(run.plan.values())},
               [{name: changed(value) for name, value in record.items()} for record in run.measurements],
               run.unreadable)


def check_harmless(text: str) -> Parsed:
    """The page, if the browser is asked for nothing but to show it."""
    parsed = Parsed(text)
    assert "script" not in {tag for tag, _ in parsed.elements} and not parsed.others
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert attributes.get("href", "#").startswith("#")
        assert not re.search(r"url\((?!#)", attributes.get("style", ""))
    text.encode()  # no lone surrogate
    assert not [c for c in text if ord(c) < 32 and c not in "\t\n"]
    return parsed


@given(st.lists(runs, min_size=1, max_size=3))
def test_no_text_of_a_run_becomes_an_element_or_an_attribute(several):
    with pytest.MonkeyPatch.context() as patch:  # the picture holds no text of a run, and takes a second
        patch.setattr(pages, "curves_as_svg", lambda runs: "<svg/>")
        parsed, plain = check_harmless(page(several)), Parsed(page([harmless(run) for run in several]))
    if len(several) == 1:  # with several runs, equal names in their plans share a row
        assert parsed.elements == plain.elements
    assert {tag for tag, _ in parsed.elements} <= {tag for tag, _ in plain.elements}


@pytest.mark.parametrize("hostile", [text for text in HOSTILE if text and text.isprintable()])
def test_a_text_is_shown_as_it_is_wherever_it_stands(hostile):
    run = Run(hostile, {hostile: hostile}, [{"step": 3, "loss": 1.0, "prompt": hostile, "sample": hostile}], 0)
    parsed = check_harmless(text := page([run, run]))
    shown = "".join(parsed.text).count(hostile)
    assert shown == 2 + 3 * 2 + 4 + 3  # in the title, above three tables, as prompts and samples, in the plan
    assert page([run, run]) == text and "svg" in {tag for tag, _ in parsed.elements}


def test_runs_that_differ_are_marked_and_keep_their_colors(tmp_path):
    for name, dim in (("a", 48), ("b", 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"dim": dim, "batch": 5, "texts": None, "sha256": {}}))
        written(tmp_path / name / "metrics.jsonl",
                [{"step": i, "loss": 1 / i} for i in range(1, 400)] + [{"step": 9, "sample": f"of {name}"}])
    text = report([tmp_path / "a", tmp_path / "b"])
    rows = re.findall(r"<tr( class=\"differs\")?><th scope=\"row\">(\w+)</th>", text)
    assert [name for differs, name in rows if differs] == ["dim"] and "sha256" not in text
    assert "of a" in text and "of b" in text and text.count("<bdi>a</bdi>") == 3
    assert curves.color_of(0) in text and curves.color_of(1) in text and curves.color_of(2) not in text
    assert curves.color_of(1) not in report([tmp_path / "a"])
    (tmp_path / "other" / "a").mkdir(parents=True)
    written(tmp_path / "other" / "a" / "metrics.jsonl", [])  # a run that has just begun, of the same name
    assert f"<bdi>{tmp_path / 'other' / 'a'}</bdi>" in report([tmp_path / "a", tmp_path / "other" / "a"])


def test_a_folder_without_a_run_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: not the folder of a training run: it has no metrics.jsonl"):
        report([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="at least one folder"):
        report([])
    written(tmp_path / "metrics.jsonl", [])
    for damaged, message in (("[]", "not what a training run writes there"), ("{", "not JSON")):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match=rf"run\.json: {message}"):
            read_run(tmp_path)


def test_without_matplotlib_there_is_no_picture_and_one_error_for_the_page(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    written(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    assert not curves.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    with pytest.raises(ValueError, match=r"curves need matplotlib, .*llama_fn\[plot\]"):
        report([tmp_path])


@given(st.lists(records, max_size=12))
def test_any_measurements_can_be_drawn(tmp_path_factory, measurements):
    folder = tmp_path_factory.mktemp("run")
    written(folder / "metrics.jsonl", measurements)
    assert curves.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_a_finite_number():
    assert [finite(x) for x in (1, 2.5, -0.0, math.nan, math.inf, 10**400, True, "1", None, [])] == [
        1.0, 2.5, -0.0, None, None, None, None, None, None, None]
