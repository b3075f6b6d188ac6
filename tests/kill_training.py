"""Kill a training run with SIGKILL again and again, and see that nothing but the steps since the last snapshot is lost.

    python tests/kill_training.py [KILLS] [SEED]

Two of three kills come inside saving: at a write (of which half is done), a sync, a rename or a removal, counted from
the beginning of the save and chosen at random. The others come at a random moment of the process. After each kill every
visible snapshot must be whole, the folder must not have grown, and the next process must resume without a traceback.
Each run that comes to its end must equal one that was never killed, bit for bit: parameters, moments, metrics.
"""

import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import SMALL, eager, metrics, result, write_texts

from llama_fn.checkpoint.files import read_json
from llama_fn.checkpoint.snapshot import load_snapshot
from llama_fn.checkpoint.snapshot_file import DTYPES
from llama_fn.cli.errors import description, is_for_the_user
from llama_fn.training import saving
from llama_fn.training.run import run

PLAN, EVERY, KEEP = SMALL, 2, 2
CHANGES = ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
NAMES = {"run.json", "lock", "tokenizer.model", "data", "snapshots", "metrics.jsonl", "params.json",
         "consolidated.00.pth"}


def kill_at(number: int, patch: pytest.MonkeyPatch, report: int) -> None:
    """Kill this process at one of its changes to the disk inside saving. The kind of the change goes to a pipe."""
    count, inside = [0], [False]

    def change(name: str, real):
        def changed(*args, **kwargs):
            if inside[0] and name in CHANGES and not (name == "write" and args[0] == report):
                count[0] += 1
                if count[0] == number:
                    if name == "write":
                        real(args[0], bytes(args[1])[:len(args[1]) // 2])
                    write(report, name.encode())
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return changed

    write, save = os.write, saving.Saver._write

    def saved(*args):
        inside[0] = True
        save(*args)
        inside[0] = False

    patch.setattr(saving.Saver, "_write", saved)
    for name in CHANGES:
        patch.setattr(os, name, change(name, getattr(os, name)))

    def write_text(path: Path, text: str) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(handle, text.encode())
        os.close(handle)

    patch.setattr(Path, "write_text", write_text)
    if number == 0:  # count the changes of the first save
        def counted(*args):
            saved(*args)
            write(report, f"{count[0]}\n".encode())
        patch.setattr(saving.Saver, "_write", counted)


def start(folder: Path, texts: Path, errors: Path, number: int | None, report: int) -> int:
    """A process of its own that begins the run in the folder or resumes it, as the command line does."""
    if process := os.fork():
        return process
    status = 1
    try:
        log = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        patch = pytest.MonkeyPatch()
        eager(patch)
        if number is not None:
            kill_at(number, patch, report)
        run(folder, PLAN, texts, resume=(folder / "run.json").is_file(), evaluate_every=EVERY, keep=KEEP)
        status = 0
    except Exception as error:
        if is_for_the_user(error):
            print(f"llama-fn: {description(error)}", file=sys.stderr, flush=True)
            status = 2
        else:
            traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(process: int, after: float | None) -> int:
    """The status with which a process ended by itself, or was killed after some seconds."""
    until = math.inf if after is None else time.perf_counter() + after
    while not (found := os.waitpid(process, os.WNOHANG))[0]:
        if time.perf_counter() > until:
            os.kill(process, signal.SIGKILL)
            return os.waitpid(process, 0)[1]
        time.sleep(0.002)
    return found[1]


def check(folder: Path) -> int:
    """Every visible snapshot is whole; nothing is there that should not be. Gives the number of hidden leftovers."""
    steps = sorted((folder / "snapshots").glob("step-*"))
    for step in steps:
        kinds = read_json(step / "manifest.json")["leaves"]
        like = {name: torch.empty(kind["shape"], dtype=DTYPES[kind["dtype"]]) for name, kind in kinds.items()}
        load_snapshot(like, step)
    assert len(steps) <= KEEP + 2, steps  # the best, and one that was written and not yet made room for
    hidden = [path for path in folder.rglob(".*") if not any(part.startswith(".") for part in
                                                             path.relative_to(folder).parent.parts)]
    visible = {path.name for path in folder.iterdir()} - {path.name for path in hidden}
    assert visible <= NAMES, visible
    assert len(hidden) <= 3, hidden
    return len(hidden)


def main(kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw, root = random.Random(seed), Path(tempfile.mkdtemp())
    texts, errors = write_texts(root / "texts"), root / "errors"
    counted, report = os.pipe()
    for folder in (root / "whole", root / "again"):  # the first one also loads libraries
        begun = time.perf_counter()
        assert ended(start(folder, texts, errors, 0, report), None) == 0, errors.read_text()
        took = time.perf_counter() - begun
    changes = int(os.read(counted, 1000).split()[0])
    whole, at, resumed, most, finished, silent = result(root / "whole"), Counter(), 0, 0, 0, 0
    folder = root / "0"
    while at.total() < kills or resumed:  # the last run comes to its end, too
        inside = draw.random() < 2 / 3
        number = draw.randint(1, 2 * changes) if inside else None  # in one of its first two saves
        if at.total() >= kills:
            inside, number = True, None
        process = start(folder, texts, errors, number, report)
        status = ended(process, None if inside else draw.random() * took)
        most = max(most, check(folder))
        if os.WIFSIGNALED(status):
            resumed += 1
            at[os.read(counted, 100).decode() if inside else "a random moment"] += 1
            continue
        assert os.waitstatus_to_exitcode(status) == 0, errors.read_text()
        assert result(folder) == whole, (folder, metrics(folder))
        assert not list(folder.rglob(".*")) and not (folder / "lock").exists()
        finished += resumed > 0
        silent, resumed = silent + resumed, 0
        print(f"{silent} kills, {finished} runs at their end: {dict(at)}", flush=True)
        folder = root / f"{finished}-{at.total()}"
    said = errors.read_text()
    assert "Traceback" not in said, said
    for line in {line.replace(str(root), "") for line in said.splitlines()}:
        print(f"said: {line[:200]}")
    inside = at.total() - at["a random moment"]
    print(f"{at.total()} kills, {inside} inside saving ({changes} changes each): {dict(at)}")
    print(f"{finished} runs came to their end after {silent} kills, each equal to one that was never killed; "
          f"at most {most} hidden files at a time")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
