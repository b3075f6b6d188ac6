"""`run`: train a model in a folder, with snapshots from which the run can be resumed.

The folder holds these files:

- ``tokenizer.model``, ``params.json``, ``consolidated.00.pth``: the model, which `lf.load` reads; after the last step.
- ``data/train.bin``, ``data/valid.bin``: the texts as tokens, for training and for validation.
- ``run.json``: the manifest, with the plan and the digests of texts and files.
- ``snapshot.pt``: the state to resume from.
- ``metrics.jsonl``: the measurements, one in each line.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llama_fn import random
from llama_fn.checkpoint.atomic import appending, sync
from llama_fn.checkpoint.load import Model, save
from llama_fn.checkpoint.snapshot import load_snapshot, save_snapshot
from llama_fn.model.init import init_params
from llama_fn.text import parse, read_text
from llama_fn.training.data import open_corpus
from llama_fn.training.encode import DialogTokens
from llama_fn.training.loop import TrainState, evaluate, init_state, train
from llama_fn.training.manifest import (
    FILES,
    check_files,
    check_plan,
    check_texts,
    convert_files,
    digest_texts,
    file_of,
    read_manifest,
    write_manifest,
)
from llama_fn.training.plan import Plan
from llama_fn.training.prepare import (
    ReportPreparing,
    clear,
    lowest_loss,
    prepare,
    sources_of_files,
    sources_of_stories,
)
from llama_fn.training.texts import text_files

ReportMeasurement = Callable[[dict], None]
SNAPSHOT, METRICS = "snapshot.pt", "metrics.jsonl"


def run(folder: str | os.PathLike, plan: Plan, texts: str | os.PathLike | None = None, *, resume: bool = False,
        evaluate_every: int | None = None, device: torch.device | str | None = None,
        report: ReportMeasurement = lambda measurement: None, dialog_tokens: DialogTokens | None = None,
        preparing: ReportPreparing = lambda name, count, size: None) -> Model:
    """Train a model in a folder, save it there, and return it.

    ``texts`` is a file or a folder (see `documents`), or None to train on the embedded stories. If there are dialogs in
    it, pass ``dialog_tokens=lf.dialog_tokens``. ``preparing`` is ``report`` of `prepare`.

    ``report`` is called with each measurement, a dictionary, which is also appended to ``metrics.jsonl``. There is one
    before the first step, which takes a while because it compiles; one after every step; and one with "valid_loss"
    after every evaluation. There is an evaluation every ``evaluate_every`` steps and after the last one. None means
    500, or a quarter of all steps if that is less. A snapshot is written after every evaluation and at an
    interruption. The first Ctrl-C stops after the current step. The second one stops at once, and leaves the last
    snapshot as it is.

    ``resume`` continues from the snapshot, and the result is the same, bit for bit, as that of a run that never
    stopped. The texts must have the same contents, or be None: then the tokens in the folder are used. Numbers that
    are None in the plan are taken from the run. The plan may have another number of steps. From the next step on, the
    learning rate then follows the schedule for that number; the result differs from that of a run which had this
    number from the start.

    Raises `FileNotFoundError` if there is no run to resume. Raises `ValueError`, before any work, if the folder holds
    a run and ``resume`` is false, or if the run in it has another plan, other texts or a damaged file. Raises
    `KeyboardInterrupt` after Ctrl-C.

    Example: ``model = run("my-run", Plan(steps=2000), "my-texts/")``.
    """
    if evaluate_every is not None and evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1, got {evaluate_every}")
    plan.check()
    folder = Path(folder)
    previous = read_manifest(folder, resume)
    plan = (plan if previous is None else plan.continued(previous)).filled()
    plan.check()
    optimizer, steps = plan.optimizer(), plan.steps
    assert steps is not None  # `filled` gives a number
    plan.config()  # raises for sizes that do not make a model
    every = min(500, max(1, steps // 4)) if evaluate_every is None else evaluate_every
    files, known = None, None
    if texts is not None:
        files = text_files(texts, folder.resolve())
        known = digest_texts(files, Path(texts))
    if previous is not None:
        check_plan(folder, previous, plan)
        if known is not None:
            check_texts(folder, previous, known)
    of_stories = texts is None if previous is None else previous.get("texts") is None
    init_key, batch_key, train_key, held_out_key = random.split(random.key(plan.seed), 4)
    sources = None
    if files is not None:
        sources = sources_of_files(files)
    elif of_stories:
        sources = sources_of_stories(plan.stories, train_key, held_out_key)
    try:
        present = [name for name in FILES if file_of(folder, name).is_file()]
        check_files(folder, previous, present)
        previous = convert_files(folder, previous)
        tokenizer = prepare(folder, plan.vocab_size, sources, dialog_tokens, preparing)
        check_files(folder, previous, {*FILES} - {*present})
        plan = dataclasses.replace(plan, vocab_size=tokenizer.vocab_size)
        config = plan.config()
        training, validation = (open_corpus(folder / "data" / f"{part}.bin", tokenizer, plan.context)
                                for part in ("train", "valid"))
        lowest = {"floor": lowest_loss(folder, tokenizer, held_out_key, plan.context)} if of_stories else {}
        state = init_state(init_params(init_key, config, device=device), optimizer)
        if (folder / SNAPSHOT).is_file():
            state = load_snapshot(state, folder / SNAPSHOT)
        if previous is not None:
            _check_steps(folder, previous, steps, int(state.step))
        kept = _lines_until(folder / METRICS, int(state.step))
        write_manifest(folder, plan, known, previous)
    except BaseException:
        if previous is None:
            clear(folder)
        raise

    with appending(folder / METRICS, "".join(kept)) as write:
        def log(measurement: dict) -> None:
            write(json.dumps(measurement) + "\n")
            report(measurement)

        def save_state(state: TrainState) -> None:  # the measurements must reach the disk before the state does
            sync(folder / METRICS)
            save_snapshot(state, folder / SNAPSHOT)

        tokens, seconds, first = 0, 0.0, True  # counted after the first step, which compiles
        with _interrupts() as interrupted:
            log({"step": int(state.step), "steps": steps, "parameters": config.n_params,
                 "training_tokens": len(training.tokens)})
            begun = since = time.perf_counter()
            shape = (plan.micro_batches, plan.batch)
            for state, measured in train(state,  # noqa: B020, the state before the first step
                                         optimizer, training, batch_key, steps, shape):
                step, now = int(state.step), time.perf_counter()
                log({"step": step, "loss": float(measured.loss), "grad_norm": float(measured.grad_norm),
                     "tokens_per_second": round((tokens + int(measured.count)) / (seconds + now - since)),
                     "seconds": round(now - begun, 2)})
                if first:
                    first = False
                else:
                    tokens, seconds = tokens + int(measured.count), seconds + now - since
                if step % every == 0 or step == steps:
                    log({"step": step, "valid_loss": evaluate(state.params, validation), **lowest})
                    save_state(state)
                since = time.perf_counter()  # leaves out the evaluation
                if interrupted:
                    save_state(state)
                    raise KeyboardInterrupt
    model = Model(state.params, tokenizer)
    save(model, folder)
    return model


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A context manager that yields a list, to which the first Ctrl-C appends; the second one stops at once.

    So the current step is finished before the run stops.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield seen
        return

    def note(number: int, frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, previous)
        with contextlib.suppress(RuntimeError):  # stderr may be in the middle of a write
            print("\nstops after this step; press Ctrl-C again to stop now", file=sys.stderr, flush=True)

    previous = signal.signal(signal.SIGINT, note) or signal.SIG_DFL  # None if the handler is not Python's
    try:
        yield seen
    except RuntimeError:
        if not seen:
            raise
        raise KeyboardInterrupt from None  # the terminal's Ctrl-C also stopped the C++ compiler
    finally:
        signal.signal(signal.SIGINT, previous)


def _check_steps(folder: Path, previous: dict[str, Any], steps: int, taken: int) -> None:
    """Raise `ValueError` if the run has taken more steps already, and warn if its number of steps changes."""
    if taken > steps:
        raise ValueError(f"{folder} holds a run that has taken {taken} steps; it cannot end after {steps}")
    if steps != previous.get("steps"):
        warnings.warn(f"{folder}: a run of {previous.get('steps')} steps becomes one of {steps}; from step {taken + 1} "
                      "on the learning rate follows the schedule of the new number", stacklevel=3)


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of ``metrics.jsonl`` up to a step, without an incomplete last line. Raises `ValueError` for others."""
    if not path.is_file():
        return []
    kept = []
    for number, line in enumerate(read_text(path).splitlines(keepends=True), 1):
        if line.endswith("}\n"):
            measurement = parse(line, f"{path}, line {number}")
            if not isinstance(measurement, dict) or not isinstance(measurement.get("step"), int):
                raise ValueError(f"{path}, line {number}: not what a training run writes there")
            if measurement["step"] <= step and "parameters" not in measurement:
                kept.append(line)
    return kept
