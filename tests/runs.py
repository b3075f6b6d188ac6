"""Small training runs in folders, uncompiled, and what is compared of them."""

import errno
import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from llama_fn.checkpoint.snapshot import save_snapshot
from llama_fn.training import loop, saving
from llama_fn.training.plan import Plan
from llama_fn.training.run import run
from llama_fn.training.snapshots import snapshot_steps
from llama_fn.training.step import make_step

SMALL = Plan(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=20, context=24, steps=8, batch=2)
TEXTS = {"a.txt": "the cat sat on the mat.\n" * 30, "b.jsonl": '{"text": "the dog ran to the cat."}\n' * 30,
         "c.md": "the mat is on the dog.\n" * 30}
TIMES = ("seconds", "tokens_per_second", "tflops", "mfu", "memory")  # what differs between two runs of one plan


def write_texts(folder: Path, texts: dict[str, str] = TEXTS) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in texts.items():
        (folder / name).write_text(content)
    return folder


def eager(patch: pytest.MonkeyPatch) -> None:
    """A step that is not compiled; to compile one takes 15 s."""
    patch.setattr(loop, "jit_step", make_step)


def disk_that_fails(patch: pytest.MonkeyPatch, steps: set[int],
                    error=lambda: OSError(errno.ENOSPC, "No space left on device", "x")) -> None:
    """From now on, the snapshots of these steps cannot be written."""
    def failing(state, folder, about, before_write, ranks):
        if about["step"] in steps:
            raise error()
        save_snapshot(state, folder, about, before_write, ranks)

    patch.setattr(saving, "save_snapshot", failing)


def signal_after(step: int, *numbers: int):
    """A `report` that raises signals after a step: SIGINT if none is named."""
    def report(record: dict) -> None:
        if record.get("step") == step and "loss" in record:
            for number in numbers or (signal.SIGINT,):
                signal.raise_signal(number)
    return report


def stopped_run(root: Path, plan: Plan = SMALL, step: int = 6, **options) -> Path:
    """The folder of a run on `root`/texts that was stopped by Ctrl-C after a step."""
    with pytest.raises(KeyboardInterrupt):
        run(root / "run", plan, write_texts(root / "texts"), report=signal_after(step), **options)
    return root / "run"


def wait_for_snapshot(run: Path, step: int) -> None:
    """Return when the thread that writes the snapshot of a step has written it."""
    while step not in snapshot_steps(run):
        time.sleep(0.01)


def metrics(folder: Path) -> list[dict]:
    """The records of `metrics.jsonl` without the times in them."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def result(folder: Path) -> tuple:
    """All that a finished run has learned: parameters, moments and step, the model, and the metrics."""
    last = max((folder / "snapshots").glob("step-*"))
    return last.name, (last / "state.safetensors").read_bytes(), model(folder), metrics(folder)


def model(folder: Path) -> dict[str, bytes]:
    import torch
    state = torch.load(folder / "consolidated.00.pth")
    return {name: x.numpy().tobytes() for name, x in state.items()}


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def edit_manifest(folder: Path, **changes) -> None:
    """Change entries of `run.json`, which then has no checksum, as in earlier versions; `...` takes an entry out."""
    manifest = json.loads((folder / "run.json").read_text()) | changes
    del manifest["checksum"]
    (folder / "run.json").write_text(json.dumps({name: x for name, x in manifest.items() if x is not ...}))
