"""``metrics.jsonl``: lines are appended whole, even if the disk was full meanwhile, and none is ever lost."""

import errno
import hashlib
import json
import math
import os
from contextlib import closing

import pytest
from folders import limited
from hypothesis import given
from hypothesis import strategies as st

from llama_fn.training.record import MetricsFile, kept_metrics, lines_until


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=9), st.integers(0, 9))
def test_the_extent_at_a_step_gives_back_the_lines_up_to_it(tmp_path_factory, drawn, at):
    path, lines, extents = tmp_path_factory.mktemp("run") / "metrics.jsonl", [], []
    with closing(MetricsFile(path, b"")) as metrics:
        for number, _ in drawn:
            extents.append(metrics.extent())
            metrics.append({"step": number})
            lines.append(f'{{"step": {number}}}\n'.encode())
        extents.append(metrics.extent())
    at = min(at, len(drawn))
    kept = kept_metrics(path, extents[at])
    assert kept == b"".join(lines[:at])
    with closing(MetricsFile(path, kept)) as metrics:  # a run that goes on from there
        assert metrics.extent() == extents[at]
        metrics.append({"step": 7})
    assert path.read_bytes() == kept + b'{"step": 7}\n'


def test_a_full_disk_is_told_once_and_no_line_is_lost_or_doubled(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsFile(path, b"")) as metrics:
        metrics.append({"step": 0})
        with limited(16):
            with pytest.warns(UserWarning, match=r"metrics\.jsonl: File too large.*; the run goes on") as said:
                for step in range(1, 5):
                    metrics.append({"step": step})
            assert len(said) == 1
            with pytest.raises(OSError, match="File too large") as error:
                metrics.flush()
            assert error.value.filename == str(path)
            assert path.stat().st_size == 16  # a part of a line arrived
        metrics.append({"step": 5})
        with limited(70), pytest.warns(UserWarning):  # it is told again after it was well
            metrics.append({"step": 6})
        assert metrics.extent()["bytes"] == 12 * 7
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(7)]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == metrics.extent()["sha256"]


def test_the_file_is_replaced_atomically_or_not_touched(tmp_path, monkeypatch):
    """A run that is killed while it cuts the file has the old one or the new one."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\ntwo\nthr")
    before = path.stat().st_ino
    MetricsFile(path, b"one\ntwo\nthr").close()
    assert path.stat().st_ino == before
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(os, "replace", full)
        MetricsFile(path, b"one\ntwo\n")
    assert path.read_bytes() == b"one\ntwo\nthr" and os.listdir(tmp_path) == ["metrics.jsonl"]
    MetricsFile(path, b"one\ntwo\n").close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with closing(MetricsFile(tmp_path / "m", b"")) as metrics:
        metrics.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "skipped": True})
        metrics.append({"step": 2, "loss": [math.nan, 0.5]})
    first, second = (tmp_path / "m").read_text().splitlines()
    assert json.loads(first) == {"step": 1, "loss": None, "grad_norm": None, "skipped": True}
    assert second == '{"step": 2, "loss": [null, 0.5]}'


def test_other_contents_are_an_error_and_a_missing_file_a_warning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsFile(path, b"")) as metrics:
        for step in range(3):
            metrics.append({"step": step})
    extent, whole = metrics.extent(), path.read_bytes()
    for damaged in (whole[:-1], b"", whole.replace(b"1", b"2"), whole[12:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"metrics\.jsonl: damaged, or not of this run"):
            kept_metrics(path, extent)
    path.unlink()
    with pytest.warns(UserWarning, match="goes on without its earlier measurements"):
        assert kept_metrics(path, extent) == b""
    assert kept_metrics(path, {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}) == b""


@pytest.mark.parametrize("line", ["[1]\n", '{"step": "x"}\n', '{"loss": 1}\n', "{}}\n", '{"step": \xff}\n'])
def test_lines_of_an_earlier_version_that_are_none_are_an_error_with_their_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'{"step": 3}\n{"step": 2')
    if line == "[1]\n":  # not the end of an object: a line cut short
        assert lines_until(path, 2) == b'{"step": 1}\n' and lines_until(path, 3).endswith(b'{"step": 3}\n')
    else:
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not "):
            lines_until(path, 2)
