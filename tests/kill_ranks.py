"""Kill one of two processes of a training run again and again, and see that `torchrun` brings the run back.

    python tests/kill_ranks.py [KILLS] [SEED]

Which of the two is chosen at random, and so is the moment: a step of the run and a time within it; any time after the
processes started, when they import, join each other and read the snapshot; or one of its changes to the disk while
both of them save. The processes that `torchrun` starts
again must go on from the newest snapshot at that time or from a newer one. Each run must end by itself with parameters,
moments and metrics that equal those of a run that was never killed, bit for bit.

`torchrun` runs this file, too: its processes are `llama-fn train` with a step that is not compiled.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

EVERY, MOST, SOON = 12, 8, 60  # MOST: kills in one run; SOON: steps until the next one
CHANGES = 24  # to the disk by one process, within two saves
RUN = ["--dim", "16", "--n-layers", "1", "--n-heads", "4", "--n-kv-heads", "2", "--hidden-dim", "24", "--context", "24",
       "--batch", "4", "--vocab-size", "288", "--peak-tflops", "0.1", "--keep", "2", "--mesh", "dp=2",
       "--evaluate-every", str(EVERY)]
BEGINNING = 8.0  # seconds, about, from the start of the processes to their first step


def process() -> None:
    """One process of a run. The first one leaves the step from which it goes on in a file.

    Before a process saves, it looks for a file that names it and one of its next changes to the disk, at which it kills
    itself.
    """
    import pytest
    from kill_training import kill_at

    from llama_fn.cli.main import main
    from llama_fn.training import loop, run, saving
    from llama_fn.training.step import make_step

    begin, save, at, patch = run.begin, saving.Saver._write, Path(os.environ["AT"]), pytest.MonkeyPatch()

    def saved(*args):
        if at.is_file() and (words := at.read_text().split())[0] == os.environ["RANK"]:
            at.rename(at.with_suffix(".taken"))
            kill_at(int(words[1]), patch, os.open(at.with_suffix(".killed"), os.O_WRONLY | os.O_CREAT | os.O_APPEND))
            return saving.Saver._write(*args)
        return save(*args)

    saving.Saver._write = saved

    def begun(*args):
        state = begin(*args)
        if os.environ["RANK"] == "0":
            with Path(os.environ["FROM"]).open("a") as file:
                print(os.environ["TORCHELASTIC_RESTART_COUNT"], int(state.state.step), file=file)
        return state

    loop.jit_step, run.begin = make_step, begun
    main()


def start(folder: Path, texts: Path, steps: int) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                "--max-restarts", str(MOST + 1), __file__]
    with folder.with_suffix(".said").open("wb") as said:
        return subprocess.Popen(
            [*torchrun, "train", str(texts), "--out", str(folder), *RUN, "--steps", str(steps)], stdout=said,
            stderr=said, env={**os.environ, "FROM": str(folder.with_suffix(".from")),
                              "AT": str(folder.with_suffix(".at")), "OMP_NUM_THREADS": "1"})


def processes_of(torchrun: int) -> list[int]:
    """The processes that `torchrun` runs now, in the order of their ranks."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    ranks = {child: rank for child in map(int, children) if (rank := _rank(child)) is not None}
    return sorted(ranks, key=lambda child: ranks[child])


def _rank(process: int) -> str | None:
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((x.decode() for x in variables if x.startswith(b"RANK=")), None)


def newest(folder: Path) -> int:
    """The step of the newest snapshot; 0 if there is none."""
    return max((int(path.name[5:]) for path in folder.glob("snapshots/step-*")), default=0)


def taken(folder: Path) -> int:
    """The steps that the run has taken, by its measurements."""
    try:
        *lines, _ = (folder / "metrics.jsonl").read_bytes().split(b"\n")
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def result(folder: Path) -> tuple:
    from runs import metrics, model

    last = max((folder / "snapshots").glob("step-*"))
    state = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    return last.name, state, model(folder), metrics(folder)


def killed(torchrun: subprocess.Popen, folder: Path, steps: int, draw: random.Random,
           before: list[int]) -> tuple[str, int] | None:
    """Kill a process at a random moment. Gives what was killed, and the newest snapshot then; None at the run's end."""
    def until(reached: Callable[[], bool]) -> None:
        while torchrun.poll() is None and not reached():
            time.sleep(0.002)

    def started() -> bool:
        now[:] = processes_of(torchrun.pid)
        return len(now) == 2 and not set(now) & set(before)

    now: list[int] = []
    until(started)
    began, which, kind = time.monotonic(), draw.randrange(2), draw.random()
    if kind < 0.4:
        at, report, snapshot = folder.with_suffix(".at"), folder.with_suffix(".killed"), newest(folder)
        many = len(text_of(report))
        at.with_suffix(".new").write_text(f"{which} {draw.randint(1, CHANGES)}")
        at.with_suffix(".new").rename(at)
        until(lambda: len(text_of(report)) > many)
        at.unlink(missing_ok=True)
        if torchrun.poll() is not None:
            return None
        before[:] = now
        return f"rank {which} inside saving, at its {text_of(report)[many:]}", snapshot
    if kind < 0.6:
        moment, step = began + draw.random() * BEGINNING, 0
    else:
        step = min(steps, newest(folder) + draw.randint(1, SOON))
        until(lambda: time.monotonic() > began + 1 and taken(folder) >= step)
        moment = time.monotonic() + draw.random() * 0.03
    until(lambda: time.monotonic() >= moment)
    if torchrun.poll() is not None:
        return None
    snapshot = newest(folder)
    os.kill(now[which], signal.SIGKILL)
    before[:] = now
    return f"rank {which} " + (f"after step {step}" if step else f"{moment - began:.1f} s after its start"), snapshot


def text_of(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def main(kills: int, seed: int) -> None:
    draw, root, steps = random.Random(seed), Path(tempfile.mkdtemp()), min(240, 48 + 24 * kills)
    texts = root / "a.txt"
    texts.write_text("the cat sat on the mat.\n" * 90)
    assert start(root / "whole", texts, steps).wait() == 0, (root / "whole.said").read_text()
    whole, count, runs = result(root / "whole"), 0, 0
    while count < kills:
        folder = root / f"run-{runs}"
        torchrun, before, goes_on = start(folder, texts, steps), [], [0]
        for _ in range(min(MOST, kills - count)):
            if (found := killed(torchrun, folder, steps, draw, before)) is None:
                break
            count, goes_on = count + 1, [*goes_on, found[1]]
            print(f"{count}: {found[0]}, newest snapshot {found[1]}", flush=True)
        status = torchrun.wait()
        said = folder.with_suffix(".said").read_text(errors="replace")
        assert status == 0, said
        assert result(folder) == whole, (folder, said)
        # A process that was killed before it found its snapshot left no line.
        came = [tuple(map(int, line.split())) for line in folder.with_suffix(".from").read_text().splitlines()]
        assert all(step >= goes_on[start] for start, step in came) and came == sorted(came), (came, goes_on)
        runs += 1
        lines = {line.split("llama-fn: ")[1] for line in said.splitlines() if "llama-fn: " in line}
        print(f"run {runs} came to its end, and equals the one that was never killed; it went on from "
              f"{[step for _, step in came]}",
              flush=True)
        for line in sorted(lines):
            print(f"  said: {line[:160]}")
    print(f"{count} kills in {runs} runs; each run came back by itself, and ended in the same bits")


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        process()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
