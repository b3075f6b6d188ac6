"""Snapshots are written in the background: of a copy, one at a time, and a disk that fails does not stop the run."""

import threading
import time
from contextlib import closing, contextmanager

import pytest
import torch
from runs import SMALL, disk_that_fails, eager, metrics, result, signal_after, write_texts

from llama_fn.checkpoint.snapshot import load_snapshot, save_snapshot
from llama_fn.training import saving
from llama_fn.training.record import MetricsFile
from llama_fn.training.run import run
from llama_fn.training.saving import Saver
from llama_fn.training.snapshots import snapshot_folder, snapshot_steps


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    eager(monkeypatch)


@contextmanager
def saver(folder, keep: int = 9):
    folder.mkdir(exist_ok=True)
    with closing(MetricsFile(folder / "metrics.jsonl", b"")) as metrics, Saver(folder, keep) as saver:
        yield lambda state, step: saver.save(state, {"step": step}, metrics), saver


def test_the_state_may_be_overwritten_as_soon_as_save_returns(tmp_path, monkeypatch):
    overwritten, state = threading.Event(), {"x": torch.arange(5.0), "y": (torch.ones(3, dtype=torch.bfloat16),)}

    def late(*args):
        assert threading.current_thread() is not threading.main_thread() and overwritten.wait(20)
        save_snapshot(*args)

    monkeypatch.setattr(saving, "save_snapshot", late)
    with saver(tmp_path) as (save, _):
        save(state, 1)
        state["x"].zero_()  # as a donated step does
        overwritten.set()
    assert torch.equal(load_snapshot(state, snapshot_folder(tmp_path, 1))["x"], torch.arange(5.0))


def test_one_write_is_at_work_at_a_time_and_all_are_done_at_the_end(tmp_path, monkeypatch):
    at_work, most, threads = [0], [0], threading.active_count()

    def slow(*args):
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        time.sleep(0.05)
        save_snapshot(*args)
        at_work[0] -= 1

    monkeypatch.setattr(saving, "save_snapshot", slow)
    with saver(tmp_path) as (save, _):
        for step in (1, 2, 2, 3):
            save({"x": torch.tensor(step)}, step)
    assert most == [1] and snapshot_steps(tmp_path) == [1, 2, 3] and threading.active_count() == threads


def test_a_full_disk_is_told_once_and_tried_again(tmp_path, monkeypatch):
    disk_that_fails(monkeypatch, {2, 3, 5})
    with pytest.warns(UserWarning) as said, saver(tmp_path) as (save, _):
        for step in range(1, 7):
            save({"x": torch.tensor(step)}, step)
    assert [str(x.message).split(":")[0] for x in said] == ["no snapshot of step 2", "no snapshot of step 5"]
    assert "No space left on device; the run goes on, and tries again at the next snapshot" in str(said[0].message)
    assert snapshot_steps(tmp_path) == [1, 4, 6]


@pytest.mark.parametrize("last", [False, True])
def test_any_other_error_of_the_thread_reaches_the_run(tmp_path, monkeypatch, last):
    disk_that_fails(monkeypatch, {1}, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError), saver(tmp_path) as (save, now):
        save({"x": torch.tensor(1)}, 1)
        if not last:
            while now.writing is not None:
                now.look()
            pytest.fail("it did not come")


def test_a_run_on_a_full_disk_goes_on_and_can_be_resumed(tmp_path, monkeypatch):
    texts = write_texts(tmp_path / "texts")
    run(tmp_path / "whole", SMALL, texts, evaluate_every=2)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no snapshot of step 4") as said:
        disk_that_fails(patch, {4, 6})
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", SMALL, texts, evaluate_every=2, report=signal_after(7))
    assert len(said) == 1 and snapshot_steps(tmp_path / "run") == [2, 7]
    run(tmp_path / "run", SMALL, resume=True, evaluate_every=2)
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_a_run_that_cannot_save_when_it_is_stopped_says_so(tmp_path, monkeypatch):
    texts = write_texts(tmp_path / "texts")
    disk_that_fails(monkeypatch, {3})
    with pytest.warns(UserWarning, match="no snapshot of step 3"), \
            pytest.raises((OSError, KeyboardInterrupt), match="No space left"):
        run(tmp_path / "run", SMALL, texts, evaluate_every=2, report=signal_after(3))
    assert snapshot_steps(tmp_path / "run") == [2]


def test_an_error_in_the_run_does_not_lose_the_snapshot_that_is_being_written(tmp_path, monkeypatch):
    def slow(*args):
        time.sleep(0.1)
        save_snapshot(*args)

    def broken(record: dict) -> None:
        if record["step"] == 3:
            raise ZeroDivisionError

    monkeypatch.setattr(saving, "save_snapshot", slow)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", SMALL, write_texts(tmp_path / "texts"), evaluate_every=2, report=broken)
    assert snapshot_steps(tmp_path / "run") == [2] and metrics(tmp_path / "run")[-1]["step"] == 3
