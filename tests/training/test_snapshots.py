"""Which snapshot a run goes on from, which it keeps, and what it says of damaged ones."""

import json
import math
import os
import shutil
import signal
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import SMALL, copied, eager, edit_manifest, metrics, result, stopped_run

from llama_fn.checkpoint.sealed import sealed, unsealed
from llama_fn.checkpoint.snapshot import load_snapshot, read_about, save_snapshot
from llama_fn.training import begin, loop, prepare, supervise
from llama_fn.training import run as module
from llama_fn.training.guarded import guarded
from llama_fn.training.run import run
from llama_fn.training.snapshots import newest_snapshot, prune, snapshot_folder, snapshot_steps
from llama_fn.training.step import make_step


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run that was stopped after step 6 (`run`), and one that never stopped (`whole`)."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        eager(patch)
        stopped_run(root, evaluate_every=2)
        run(root / "whole", SMALL, root / "texts", evaluate_every=2)
    return root


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    eager(monkeypatch)


def accept(about: dict) -> None:
    pass


# --- the newest whole one


def test_the_newest_whole_snapshot_wins_and_the_skipped_ones_are_named(root, tmp_path):
    folder = copied(root / "run", tmp_path / "run")
    assert snapshot_steps(folder) == [2, 4, 6]
    (snapshot_folder(folder, 6) / "manifest.json").unlink()
    content = bytearray((snapshot_folder(folder, 4) / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (snapshot_folder(folder, 4) / "state.safetensors").write_bytes(content)
    seen = []
    with pytest.warns(UserWarning) as said:
        run(folder, SMALL, resume=True, evaluate_every=2, report=seen.append)
    (line,) = [str(x.message) for x in said]
    assert "\n" not in line and line.endswith("; the run goes on from step 2")
    assert "snapshots: skipped step-00000006 (manifest.json: no such file), step-00000004 (1 leaves do not fit" in line
    assert [record["step"] for record in seen if "loss" in record] == [3, 4, 5, 6, 7, 8]
    assert result(folder) == result(root / "whole")


def test_a_run_whose_snapshots_are_all_damaged_does_not_begin_anew_in_silence(root, tmp_path):
    folder = copied(root / "run", tmp_path / "run")
    for step in snapshot_steps(folder):
        os.truncate(snapshot_folder(folder, step) / "state.safetensors", 99)
    before = metrics(folder)
    with pytest.raises(ValueError, match=r"no snapshot is whole: step-00000006 \(state.safetensors.*remove that folde"):
        run(folder, SMALL, resume=True)
    assert metrics(folder) == before
    shutil.rmtree(folder / "snapshots")
    run(folder, SMALL, resume=True, evaluate_every=2)
    assert result(folder) == result(root / "whole")


@pytest.mark.parametrize("change, reason", [
    ({"plan": {"dim": 17, "seed": 0}}, "of another run: dim was 17, is 16"),
    ({"files": {"data/train.bin": "x"}}, "of another run: data/train.bin differs"),
    ({"step": 5}, "its manifest is that of step 5"), ({"plan": 3}, "not the snapshot of a training run"),
    ({"metrics.jsonl": None}, "not the snapshot of a training run")])
def test_the_manifest_of_another_run_is_named(root, tmp_path, change, reason):
    folder = copied(root / "run", tmp_path / "run")
    file = snapshot_folder(folder, 6) / "manifest.json"
    manifest = unsealed(json.loads(file.read_text()), file)
    file.write_text(json.dumps(sealed({**manifest, "about": {**manifest["about"], **change}})))
    with pytest.warns(UserWarning, match=rf"skipped step-00000006 \({reason}\); the run goes on from step 4"):
        run(folder, SMALL, resume=True, evaluate_every=2)
    assert result(folder) == result(root / "whole")


def test_other_snapshots_may_have_another_number_of_steps(root, tmp_path):
    folder = copied(root / "run", tmp_path / "run")
    seen, longer = [], SMALL.__class__(**{**vars(SMALL), "steps": 9})
    with pytest.warns(UserWarning, match="a run of 8 steps becomes one of 9"):
        run(folder, longer, resume=True, evaluate_every=2, report=seen.append)
    assert seen[0]["step"] == 6
    run(folder, longer, resume=True, evaluate_every=2, report=seen.append)
    assert seen[-1]["step"] == 9 and "parameters" in seen[-1]  # no step was left
    for step in (8, 9):
        shutil.rmtree(snapshot_folder(folder, step))
    run(folder, longer, resume=True, evaluate_every=2, report=seen.append)
    assert [record["step"] for record in seen if "loss" in record] == [7, 8, 9] * 2


# --- which are kept


@given(st.lists(st.none() | st.floats(0, 9), min_size=1, max_size=7), st.integers(1, 3), st.integers(0, 2))
def test_the_last_and_the_best_are_kept_and_nothing_else(tmp_path_factory, losses, keep, later):
    folder = tmp_path_factory.mktemp("run")
    for step in range(1, len(losses) + later + 1):
        loss = losses[step - 1] if step <= len(losses) else 0.0
        about = {"step": step, **({} if loss is None else {"valid_loss": loss})}
        save_snapshot({"x": torch.tensor(step)}, snapshot_folder(folder, step), about)
    (folder / "snapshots" / ".step-00000001.0123abcd.part").mkdir()
    prune(folder, len(losses), keep)
    known = [loss for loss in losses if loss is not None]
    best = {losses.index(min(known)) + 1} if known else set()
    assert {*snapshot_steps(folder)} == best | {*range(max(1, len(losses) - keep + 1), len(losses) + 1)}
    assert not list((folder / "snapshots").glob(".*"))
    state, about = newest_snapshot(folder, {"x": torch.tensor(0)}, accept)
    assert int(state["x"]) == about["step"] == len(losses)


def test_a_run_keeps_as_many_as_it_is_told(root, tmp_path):
    run(tmp_path / "run", SMALL, root / "texts", evaluate_every=1, keep=2)
    losses = {record["step"]: record["valid_loss"] for record in metrics(tmp_path / "run") if "valid_loss" in record}
    assert {*snapshot_steps(tmp_path / "run")} == {7, 8, min(losses, key=losses.get)}
    assert all(read_about(snapshot_folder(tmp_path / "run", step))["valid_loss"] == losses[step]
               for step in snapshot_steps(tmp_path / "run"))
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        run(tmp_path / "other", SMALL, root / "texts", keep=0)
    assert not (tmp_path / "other").exists()


# --- what else is lost or not


def test_the_metrics_of_resumed_runs_are_those_of_one_that_never_stopped(root, tmp_path):
    """Also their first line, which says how large the model is."""
    folder = copied(root / "run", tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "loss": 1.0}\n{"step": 8, "lo')  # written after the snapshot
    run(folder, SMALL, resume=True, evaluate_every=2)
    assert metrics(folder) == metrics(root / "whole")
    first, *rest = metrics(folder)
    assert first["parameters"] and [record["step"] for record in rest if "loss" in record] == [*range(1, 9)]


def test_damaged_metrics_are_an_error_and_stay_as_they_are(root, tmp_path):
    folder = copied(root / "run", tmp_path / "run")
    content = (folder / "metrics.jsonl").read_bytes()
    for damaged in (content[:len(content) // 2], b"x" + content[1:]):
        (folder / "metrics.jsonl").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"metrics\.jsonl: damaged"):
            run(folder, SMALL, resume=True)
        assert (folder / "metrics.jsonl").read_bytes() == damaged


def test_the_numbers_in_the_metrics_mean_what_they_say(root, tmp_path, monkeypatch):
    """The learning rate of the step, the tokens a second of the step alone, and the seconds of all steps so far."""
    clock, counts = [100.0], []

    def train(*args):
        for state, measured in loop.train(*args):
            counts.append(int(measured.count))
            clock[0] += int(state.step)  # step n takes n seconds
            yield state, measured

    def evaluate(*args):
        clock[0] += 1000
        return 1.0

    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(supervise, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(module, "train", train)
    folder = stopped_run(tmp_path, step=5)
    run(folder, SMALL, resume=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, rate = [record for record in lines if "loss" in record], SMALL.schedule()
    assert [record["learning_rate"] for record in steps] == [float(rate(torch.tensor(i))) for i in range(8)]
    assert [record["tokens_per_second"] for record in steps] == [round(n / i) for i, n in enumerate(counts, 1)]
    assert [record["seconds"] for record in steps] == [i * (i + 1) / 2 for i in range(1, 9)]


def test_the_learning_rate_is_that_of_the_updates_so_far_and_skipped_steps_are_marked(root, tmp_path, monkeypatch):
    def breaks(optimizer, **options):
        step, number = make_step(optimizer), iter(range(8))
        return guarded(lambda params, *rest: step(params._replace(
            norm=params.norm * (math.nan if next(number) == 2 else 1)), *rest))

    monkeypatch.setattr(loop, "jit_step", breaks)
    seen = []
    run(tmp_path / "run", SMALL, root / "texts", report=seen.append)
    steps, rate = [record for record in metrics(tmp_path / "run") if "loss" in record], SMALL.schedule()
    assert [record.get("skipped", False) for record in steps] == [i == 2 for i in range(8)]
    assert [record["learning_rate"] for record in steps] == [float(rate(torch.tensor(i - (i > 2)))) for i in range(8)]
    assert steps[2]["loss"] is None and math.isnan([record for record in seen if "loss" in record][2]["loss"])


@pytest.mark.parametrize("stage", ["train_tokenizer", "encode_corpus", "open_corpus"])
def test_a_run_that_was_killed_while_it_prepared_can_be_resumed(root, tmp_path, monkeypatch, stage):
    if not (child := os.fork()):
        monkeypatch.setattr(begin if stage == "open_corpus" else prepare, stage,
                            lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL))
        try:
            run(tmp_path / "run", SMALL, root / "texts", evaluate_every=2)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert (tmp_path / "run" / "run.json").is_file() and not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="holds a training run already; go on with it"):
        run(tmp_path / "run", SMALL, root / "texts")
    with pytest.raises(FileNotFoundError, match="resume with the texts of the run"):
        run(tmp_path / "run", SMALL, resume=True)
    run(tmp_path / "run", SMALL, root / "texts", resume=True, evaluate_every=2)
    assert result(tmp_path / "run") == result(root / "whole")


def test_a_folder_in_which_a_run_was_killed_before_anything_was_written_is_free(root, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lock").write_text("123\n")
    (folder / ".run.json.0123abcd.part").write_text("{")
    with pytest.raises(FileNotFoundError, match="there is no run to go on with"):
        run(folder, SMALL, resume=True)
    run(folder, SMALL, root / "texts", evaluate_every=2)
    assert result(folder) == result(root / "whole")
    assert {path.name for path in folder.iterdir()} == {"run.json", "tokenizer.model", "data", "snapshots",
                                                        "metrics.jsonl", "params.json", "consolidated.00.pth"}


# --- earlier versions


def test_a_run_of_an_earlier_version_is_read_once_more_and_converted(root, tmp_path):
    folder = copied(root / "run", tmp_path / "run")
    leaves = load_leaves(snapshot_folder(folder, 6))
    checksums = {name: zlib.crc32(x.flatten().view(torch.uint8).numpy().data) for name, x in leaves.items()}
    torch.save({"leaves": leaves, "checksums": checksums}, folder / "snapshot.pt")
    shutil.rmtree(folder / "snapshots")
    edit_manifest(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    seen = []
    run(copied(folder, tmp_path / "old"), SMALL, resume=True, evaluate_every=2, report=seen.append)
    assert [record["step"] for record in seen if "loss" in record] == [7, 8]
    assert result(tmp_path / "old") == result(root / "whole")
    assert not (tmp_path / "old" / "snapshot.pt").exists()
    assert "checksum" in json.loads((tmp_path / "old" / "run.json").read_text())

    converted = copied(folder, tmp_path / "converted")

    def killed(record: dict) -> None:
        if "loss" in record:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(converted, SMALL, resume=True, report=killed)
    assert snapshot_steps(converted) == [6] and not (converted / "snapshot.pt").exists()
    assert all(map(torch.equal, load_leaves(snapshot_folder(converted, 6)).values(), leaves.values()))


def load_leaves(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    leaves = load_file(folder / "state.safetensors")
    assert all(map(torch.equal, load_snapshot(leaves, folder).values(), leaves.values()))
    return leaves
