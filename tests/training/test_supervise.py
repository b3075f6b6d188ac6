"""What a run does beside its steps: which records it writes when, and which states it saves."""

import json
import signal

import pytest
import torch
from runs import disk_that_fails

from llama_fn.training.loop import TrainState
from llama_fn.training.snapshots import snapshot_steps
from llama_fn.training.step import Metrics
from llama_fn.training.supervise import supervise


def state_of(step: int) -> TrainState:
    return TrainState(torch.tensor(10.0 * step), (), torch.tensor(step))


def taken(steps: int, since: int = 0, broken=()):
    """The states and metrics of steps; the loss of the `broken` ones is no number."""
    for step in range(since + 1, steps + 1):
        loss = torch.tensor(float("nan") if step in broken else 2.0**-step)
        yield state_of(step), Metrics(loss, torch.tensor(1.0), torch.tensor(3))


def supervised(folder, steps=5, since=0, broken=(), kept=b"", report=lambda record: None, every=2, **functions):
    """The last state of a run of fake steps, each of which is sampled at step 3 alone."""
    folder.mkdir(exist_ok=True)
    return supervise(folder, state_of(since), taken(steps, since, broken), steps=steps, every=every, seconds=0.0,
                     first={"step": since, "steps": steps}, about={}, kept=kept, keep=9, report=report, **{
                         "step_record": lambda state, metrics, interval, seconds: {"loss": float(metrics.loss)},
                         "evaluation": lambda state: {"valid_loss": float(state.params)},
                         "samples": lambda state: [{"sample": "a"}] * (int(state.step) == 3), **functions})


def written(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_come_in_order_and_are_written_and_reported(tmp_path):
    reported = []
    last = supervised(tmp_path / "run", report=reported.append, broken=[2])
    assert last == state_of(5) and reported[2].pop("loss") != 0
    lines = written(tmp_path / "run")
    assert lines[2].pop("loss") is None  # JSON has no NaN
    assert lines == reported == [
        {"step": 0, "steps": 5}, {"step": 1, "loss": 0.5}, {"step": 2, "skipped": True},
        {"step": 2, "valid_loss": 20.0}, {"step": 3, "loss": 0.125}, {"step": 3, "sample": "a"},
        {"step": 4, "loss": 0.0625}, {"step": 4, "valid_loss": 40.0}, {"step": 5, "loss": 0.03125},
        {"step": 5, "valid_loss": 50.0}]
    assert snapshot_steps(tmp_path / "run") == [2, 4, 5]


def test_a_run_that_goes_on_appends_to_its_metrics_and_its_beginning_is_not_written_again(tmp_path):
    supervised(tmp_path / "run", steps=2)
    kept, reported = (tmp_path / "run" / "metrics.jsonl").read_bytes(), []
    supervised(tmp_path / "run", since=2, kept=kept, report=reported.append)
    assert reported[0] == {"step": 2, "steps": 5}
    assert [line["step"] for line in written(tmp_path / "run")] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_without_anything_to_evaluate_states_are_saved_all_the_same(tmp_path):
    supervised(tmp_path / "run", evaluation=lambda state: {})
    assert snapshot_steps(tmp_path / "run") == [2, 4, 5]
    assert not [line for line in written(tmp_path / "run") if "valid_loss" in line]


@pytest.mark.parametrize("name, error, status", [("SIGINT", KeyboardInterrupt, None), ("SIGTERM", SystemExit, 143),
                                                 ("SIGHUP", SystemExit, 129)])
def test_after_a_signal_the_step_is_saved_and_nothing_more_is_taken(tmp_path, name, error, status):
    def report(record: dict) -> None:
        if record["step"] == 3 and "loss" in record:
            signal.raise_signal(getattr(signal, name))
            raise OSError("the terminal is closed")

    with pytest.raises(error) as stopped:
        supervised(tmp_path / "run", report=report)
    assert getattr(stopped.value, "code", None) == status
    assert snapshot_steps(tmp_path / "run") == [2, 3] and written(tmp_path / "run")[-1]["step"] == 3


def test_a_disk_that_fails_does_not_stop_a_run_and_a_report_that_fails_does(tmp_path, monkeypatch):
    def report(record: dict) -> None:
        raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        supervised(tmp_path / "other", report=report)
    disk_that_fails(monkeypatch, {2, 4})
    with pytest.warns(UserWarning, match="no snapshot of step 2"):
        assert supervised(tmp_path / "run") == state_of(5)
    assert snapshot_steps(tmp_path / "run") == [5] and written(tmp_path / "run")[-1]["valid_loss"] == 50.0
