"""Kill one of two processes of a training run again and again, and see that `torchrun` brings the run back.

    python tests/kill_ranks.py [KILLS] [SEED]

Which of the two is chosen at random, and so is the moment: a step of the run and a time within it, or any time after
the processes started, when they import, join each other and read the snapshot. The processes that `torchrun` starts
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
from pathlib import Path

STEPS, EVERY, MOST, SOON = 240, 12, 8, 60  # MOST: kills in one run; SOON: steps until the next one
RUN = ["--dim", "16", "--n-layers", "1", "--n-heads", "4", "--n-kv-heads", "2", "--hidden-dim", "24", "--context", "24",
       "--batch", "4", "--vocab-size", "288", "--peak-tflops", "0.1", "--keep", "2", "--mesh", "dp=2",
       "--steps", str(STEPS), "--evaluate-every", str(EVERY)]
BEGINNING = 8.0  # seconds, about, from the start of the processes to their first step


def process() -> None:
    """One process of a run. The first one leaves the step from which it goes on in a file."""
    from llama_fn.cli.main import main
    from llama_fn.training import loop, run
    from llama_fn.training.step import make_step

    begin = run.begin

    def begun(*args):
        state = begin(*args)
        if os.environ["RANK"] == "0":
            with Path(os.environ["FROM"]).open("a") as file:
                print(int(state.state.step), file=file)
        return state

    loop.jit_step, run.begin = make_step, begun
    main()


def start(folder: Path, texts: Path) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                "--max-restarts", str(MOST + 1), __file__]
    with folder.with_suffix(".said").open("wb") as said:
        return subprocess.Popen([*torchrun, "train", str(texts), "--out", str(folder), *RUN], stdout=said, stderr=said,
                                env={**os.environ, "FROM": str(folder.with_suffix(".from")), "OMP_NUM_THREADS": "1"})


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


def killed(torchrun: subprocess.Popen, folder: Path, draw: random.Random, before: list[int]) -> tuple[str, int] | None:
    """Kill a process at a random moment. Gives what was killed, and the newest snapshot then; None at the run's end."""
    while torchrun.poll() is None and (len(now := processes_of(torchrun.pid)) < 2 or set(now) & set(before)):
        time.sleep(0.01)
    began, step = time.monotonic(), min(STEPS, newest(folder) + draw.randint(1, SOON))
    if draw.random() < 0.3:
        step, until = 0, began + draw.random() * BEGINNING
    else:
        while torchrun.poll() is None and not (time.monotonic() > began + 1 and taken(folder) >= step):
            time.sleep(0.002)
        until = time.monotonic() + draw.random() * 0.03
    while torchrun.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    if torchrun.poll() is not None:
        return None
    which, snapshot = draw.randrange(2), newest(folder)
    os.kill(now[which], signal.SIGKILL)
    before[:] = now
    moment = f"after step {step}" if step else f"{time.monotonic() - began:.1f} s after its start"
    return f"rank {which} {moment}", snapshot


def main(kills: int, seed: int) -> None:
    draw, root = random.Random(seed), Path(tempfile.mkdtemp())
    texts = root / "a.txt"
    texts.write_text("the cat sat on the mat.\n" * 90)
    assert start(root / "whole", texts).wait() == 0, (root / "whole.said").read_text()
    whole, count, runs = result(root / "whole"), 0, 0
    while count < kills:
        folder = root / f"run-{runs}"
        torchrun, before, goes_on = start(folder, texts), [], [0]
        for _ in range(min(MOST, kills - count)):
            if (found := killed(torchrun, folder, draw, before)) is None:
                break
            count, goes_on = count + 1, [*goes_on, found[1]]
            print(f"{count}: {found[0]}, newest snapshot {found[1]}", flush=True)
        status = torchrun.wait()
        said = folder.with_suffix(".said").read_text(errors="replace")
        assert status == 0, said
        assert result(folder) == whole, (folder, said)
        came = [int(line) for line in folder.with_suffix(".from").read_text().split()]
        # A process that was killed before it found its snapshot left no line.
        assert all(any(step >= least for step in came) for least in goes_on) and came == sorted(came), (came, goes_on)
        runs += 1
        lines = {line.split("llama-fn: ")[1] for line in said.splitlines() if "llama-fn: " in line}
        print(f"run {runs} came to its end, and equals the one that was never killed; it went on from {came}",
              flush=True)
        for line in sorted(lines):
            print(f"  said: {line[:160]}")
    print(f"{count} kills in {runs} runs; each run came back by itself, and ended in the same bits")


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        process()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
