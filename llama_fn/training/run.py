"""`run`: train a model in a folder, with snapshots from which the run can be resumed.

The folder holds these files:

- ``tokenizer.model``, ``params.json``, ``consolidated.00.pth``: the model, which `lf.load` reads; after the last step.
- ``data/train.bin``, ``data/valid.bin``: the texts as tokens, for training and for validation.
- ``run.json``: the manifest, with the plan and the digests of texts and files.
- ``snapshots/step-00001000/``: the state after a step, to resume from. The last few are kept, and the best.
- ``metrics.jsonl``: the measurements, one in each line.
- ``lock``: while a process trains in the folder.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from llama_fn import tree
from llama_fn.checkpoint.load import Model, save
from llama_fn.mesh.world import ALONE, World
from llama_fn.training.begin import OLD_SNAPSHOT, Begun, begin, filled_plan
from llama_fn.training.encode import DialogTokens
from llama_fn.training.guarded import is_finite
from llama_fn.training.lock import locked
from llama_fn.training.loop import TrainState, evaluate, train, updates_taken
from llama_fn.training.manifest import MANIFEST
from llama_fn.training.placement import goes_on
from llama_fn.training.plan import Plan
from llama_fn.training.prepare import ReportPreparing
from llama_fn.training.progress import Samples, flops_per_token, memory_in_use, step_record
from llama_fn.training.record import METRICS, MetricsFile
from llama_fn.training.saving import Saver
from llama_fn.training.snapshots import snapshot_steps
from llama_fn.training.step import Metrics
from llama_fn.training.supervise import supervise

ReportMeasurement = Callable[[dict], None]


def run(folder: str | os.PathLike, plan: Plan, texts: str | os.PathLike | None = None, *, resume: bool = False,
        evaluate_every: int | None = None, keep: int = 3, device: torch.device | str | None = None,
        samples: Samples | None = None, peak: float | None = None,
        report: ReportMeasurement = lambda measurement: None, dialog_tokens: DialogTokens | None = None,
        preparing: ReportPreparing = lambda name, count, size: None, world: World = ALONE) -> Model:
    """Train a model in a folder, save it there, and return it.

    ``texts`` is a file or a folder (see `documents`), or None to train on the embedded stories. If there are dialogs in
    it, pass ``dialog_tokens=lf.dialog_tokens``. ``preparing`` is ``report`` of `prepare`.

    ``report`` is called with each measurement, a dictionary, which is also appended to ``metrics.jsonl``. There is one
    before the first step, which takes a while because it compiles; one after every step (see `step_record`); and one
    with "valid_loss" after every evaluation. There is an evaluation every ``evaluate_every`` steps and after the last
    one. None means 500, or a quarter of all steps if that is less. ``samples`` are drawn from the model at intervals.
    ``peak`` is the machine's highest number of operations per second, for "mfu" in the measurements.

    A snapshot is written in the background after every evaluation, and when a signal stops the run. The last ``keep``
    snapshots are kept, and the one with the lowest validation loss. If the disk is full or cannot be written to, a
    warning says so, the run goes on, and the next snapshot is tried again.

    The first SIGINT (Ctrl-C), SIGTERM or SIGHUP lets the current step finish; then the run saves a snapshot and stops.
    The second one stops at once, and leaves the last snapshot as it is. A step whose loss or gradient is infinite or
    NaN leaves parameters and optimizer state as they are; its record has "skipped". Ten of them in a row stop the run.

    ``resume`` continues from the newest whole snapshot, and the result is the same, bit for bit, as that of a run that
    never stopped. Every digest is checked. A warning names damaged snapshots that were skipped. The texts must have the
    same contents, or be None: then the tokens in the folder are used. Numbers that are None in the plan are taken from
    the run. The plan may have another number of steps. From the next step on, the learning rate then follows the
    schedule for that number; the result differs from that of a run which had this number from the start.

    All processes of a mesh call this with the same arguments and their ``world``, and get their parts of the model.
    The run is that of one process, up to rounding: ``plan.batch`` are the rows of all of them. It may be resumed on
    another mesh. If `torchrun` starts its processes again, the run goes on by itself. `run.json` has the mesh.

    Raises `FileNotFoundError` if there is no run to resume. Raises `ValueError`, before any work, if the folder holds
    a run and ``resume`` is false, if the run in it has another plan, other texts or a damaged file, or if another
    process trains in it. Stopped by a signal, it raises `KeyboardInterrupt` for SIGINT, and `SystemExit` with the
    status 128 + number for the others (143 for SIGTERM, 129 for SIGHUP). It raises `OSError` if that last snapshot or
    the model cannot be written.

    Example: ``model = run("my-run", Plan(steps=2000), "my-texts/")``.
    """
    for name, value in (("evaluate_every", evaluate_every), ("keep", keep)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder = Path(folder)

    def request() -> tuple[Plan, bool]:
        goes = resume or goes_on(folder / MANIFEST, world)
        filled = filled_plan(folder, plan, goes)
        world.check(filled.config())
        world.check_rows(filled.batch)
        return filled, goes

    plan, resume = world.from_first(request)  # before the lock, so that a wrong request touches nothing
    assert plan.steps is not None  # `filled_plan` gives a number
    every = min(500, max(1, plan.steps // 4)) if evaluate_every is None else evaluate_every
    with contextlib.ExitStack() as held:
        world.from_first(lambda: held.enter_context(locked(folder)))
        begun = begin(folder, plan, None if texts is None else Path(texts), resume, device, dialog_tokens, preparing,
                      world)
        _convert(folder, begun, keep, world)
        state = _supervised(folder, begun, every, keep, samples, peak, report, world)
        model = Model(state.params, begun.tokenizer)
        save(model, folder)
    return model


def _supervised(folder: Path, begun: Begun, every: int, keep: int, samples: Samples | None, peak: float | None,
                report: ReportMeasurement, world: World) -> TrainState:
    """Take all steps that are left, and return the last state."""
    plan, rate = begun.plan, begun.plan.schedule()
    assert plan.steps is not None
    flops, device = flops_per_token(plan.config(), plan.context), tree.leaves(begun.state.params)[0].device
    peak = None if peak is None else peak * world.ranks.size

    def record_of(state: TrainState, metrics: Metrics, interval: float, seconds: float) -> dict[str, Any]:
        before = updates_taken(state.opt_state) - int(is_finite(metrics))  # a step that is skipped counts as none
        return step_record(int(state.step), metrics, learning_rate=float(rate(torch.tensor(before))),
                           interval=interval, seconds=seconds, flops=flops, peak=peak, memory=memory_in_use(device))

    def samples_of(state: TrainState) -> Iterable[dict[str, Any]]:
        step = int(state.step)
        if samples is None or (step % samples.every != 0 and step != plan.steps):
            return ()
        return samples.draw(Model(state.params, begun.tokenizer), step)

    def evaluation(state: TrainState) -> dict[str, Any]:
        return {"valid_loss": evaluate(state.params, begun.validation, world=world), **begun.floor}

    taken = train(begun.state, plan.make_optimizer(), begun.training, begun.batch_key, plan.steps,
                  (plan.micro_batches, plan.batch), world=world)
    first = {"step": int(begun.state.step), "steps": plan.steps, "parameters": plan.config().n_params,
             "training_tokens": len(begun.training.tokens), "flops_per_token": flops, "peak_flops": peak}
    return supervise(folder, begun.state, taken, first=first, step_record=record_of, evaluation=evaluation,
                     samples=samples_of, steps=plan.steps, every=every, about=begun.about, seconds=begun.seconds,
                     kept=begun.kept, keep=keep, report=report, world=world)


def _convert(folder: Path, begun: Begun, keep: int, world: World) -> None:
    """Write the snapshot of an earlier version again in today's format, and remove the old file."""
    if world.mesh is not None or not (folder / OLD_SNAPSHOT).is_file():
        return
    about = {**begun.about, "step": int(begun.state.step), "seconds": begun.seconds}
    with contextlib.closing(MetricsFile(folder / METRICS, begun.kept)) as metrics, Saver(folder, keep) as saver:
        saver.save(begun.state, about, metrics)
        saver.wait()
        if saver.error is None:
            (folder / OLD_SNAPSHOT).unlink()


def has_snapshot(folder: Path) -> bool:
    """Whether a run in this folder has a snapshot to resume from."""
    return bool(snapshot_steps(folder)) or (folder / OLD_SNAPSHOT).is_file()
