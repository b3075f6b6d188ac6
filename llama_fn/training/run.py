"""A training run in a folder: tokenizer, encoded corpus, metrics, snapshots, and at the end a model that `load` reads.

    tokenizer.model  params.json  consolidated.00.pth     the model, after the last step
    data/train.bin   data/valid.bin                       the texts as tokens
    run.json         snapshot.pt  metrics.jsonl           plan and digests, the state to go on from, the measurements
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
from llama_fn.training.data import open_corpus, text_files
from llama_fn.training.loop import TrainState, evaluate, init_state, train
from llama_fn.training.plan import Plan
from llama_fn.training.prepare import clear, floor, prepare, sources_of_files, sources_of_stories
from llama_fn.training.record import (
    FILES,
    check_files,
    check_plan,
    check_texts,
    digest_texts,
    place,
    read_record,
    write_record,
)

Report = Callable[[dict], None]
SNAPSHOT, METRICS = "snapshot.pt", "metrics.jsonl"


def run(folder: str | os.PathLike, plan: Plan, texts: str | os.PathLike | None = None, *, resume: bool = False,
        evaluate_every: int | None = None, device: torch.device | str | None = None,
        report: Report = lambda record: None) -> Model:
    """Train a model on `texts` (a file or folder, see `read_texts`; None for the embedded stories) and save it.

    `report` gets a record before the first step (which compiles for a while), one a step, and one with `valid_loss` at
    every evaluation; the same go to `metrics.jsonl`. `evaluate_every` None is 500, or a quarter of fewer steps.
    A state is written at every evaluation and when the run is interrupted. The first Ctrl-C stops after the step in
    hand, the second at once, with the last state as it was.

    `resume` goes on from that state, to the same result, bit for bit, as a run that never stopped. It takes the same
    texts, by their content, or none: then it goes on with the tokens in the folder. What the plan leaves open is as it
    was. The plan may have another number of steps; then the learning rate follows the schedule of that number from the
    next step on, as if the plan had always been so, and the result is not that of one run of so many steps.

    Raises `ValueError` if the folder holds a run already and `resume` is not set, or holds one of another plan, of
    other texts or with a damaged file; all before any work.
    """
    if evaluate_every is not None and evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1, got {evaluate_every}")
    plan.check()
    folder = Path(folder)
    before = read_record(folder, resume)
    plan = (plan if before is None else plan.continued(before)).filled()
    plan.check()
    optimizer = plan.optimizer()
    plan.config()  # raises for sizes that make no model
    every = min(500, max(1, plan.steps // 4)) if evaluate_every is None else evaluate_every
    files, known = None, None
    if texts is not None:
        files = text_files(texts, folder.resolve())
        known = digest_texts(files, Path(texts))
    if before is not None:
        check_plan(folder, before, plan)
        if known is not None:
            check_texts(folder, before, known)
    of_stories = texts is None if before is None else before.get("texts") is None
    init, order, told, held_out = random.split(random.key(plan.seed), 4)
    sources = None
    if files is not None:
        sources = sources_of_files(files)
    elif of_stories:
        sources = sources_of_stories(plan.stories, told, held_out)
    try:
        there = [name for name in FILES if place(folder, name).is_file()]
        check_files(folder, before, there)
        tokenizer = prepare(folder, plan.vocab_size, sources)
        check_files(folder, before, {*FILES} - {*there})
        plan = dataclasses.replace(plan, vocab_size=tokenizer.vocab_size)
        config = plan.config()
        training, validation = (open_corpus(folder / "data" / f"{part}.bin", tokenizer, plan.context)
                                for part in ("train", "valid"))
        lowest = {"floor": floor(folder, tokenizer, held_out, plan.context)} if of_stories else {}
        state = init_state(init_params(init, config, device=device), optimizer)
        if (folder / SNAPSHOT).is_file():
            state = load_snapshot(state, folder / SNAPSHOT)
        if before is not None:
            _check_steps(folder, before, plan.steps, int(state.step))
        kept = _kept(folder / METRICS, int(state.step))
        write_record(folder, plan, known, before)
    except BaseException:
        if before is None:
            clear(folder)
        raise

    with appending(folder / METRICS, "".join(kept)) as write:
        def log(record: dict) -> None:
            write(json.dumps(record) + "\n")
            report(record)

        def keep(state: TrainState) -> None:  # a state on the disk has its measurements there, too
            sync(folder / METRICS)
            save_snapshot(state, folder / SNAPSHOT)

        tokens, seconds, first = 0, 0.0, True  # of the steps after the first, which compiles
        with _interrupts() as interrupted:
            log({"step": int(state.step), "steps": plan.steps, "parameters": config.n_params,
                 "training_tokens": len(training.tokens)})
            begun = since = time.perf_counter()
            shape = (plan.micro_batches, plan.batch)
            for state, measured in train(state,  # noqa: B020, the state before the first step
                                         optimizer, training, order, plan.steps, shape):
                step, now = int(state.step), time.perf_counter()
                log({"step": step, "loss": float(measured.loss), "grad_norm": float(measured.grad_norm),
                     "tokens_per_second": round((tokens + int(measured.count)) / (seconds + now - since)),
                     "seconds": round(now - begun, 2)})
                if first:
                    first = False
                else:
                    tokens, seconds = tokens + int(measured.count), seconds + now - since
                if step % every == 0 or step == plan.steps:
                    log({"step": step, "valid_loss": evaluate(state.params, validation), **lowest})
                    keep(state)
                since = time.perf_counter()  # an evaluation is no step
                if interrupted:
                    keep(state)
                    raise KeyboardInterrupt
    model = Model(state.params, tokenizer)
    save(model, folder)
    return model


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, so that a step is never cut in half; a second Ctrl-C stops at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield seen
        return

    def note(number: int, frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)
        with contextlib.suppress(RuntimeError):  # the signal may have come while a line was written there
            print("\nstops after this step; press Ctrl-C again to stop now", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, note) or signal.SIG_DFL  # None: another language's handler
    try:
        yield seen
    except RuntimeError:
        if not seen:
            raise
        raise KeyboardInterrupt from None  # a terminal sends Ctrl-C to the C++ compiler, too, and it ends at once
    finally:
        signal.signal(signal.SIGINT, before)


def _check_steps(folder: Path, before: dict[str, Any], steps: int, taken: int) -> None:
    if taken > steps:
        raise ValueError(f"{folder} holds a run that has taken {taken} steps; it cannot end after {steps}")
    if steps != before.get("steps"):
        warnings.warn(f"{folder}: a run of {before.get('steps')} steps becomes one of {steps}; from step {taken + 1} "
                      "on the learning rate follows the schedule of the new number", stacklevel=3)


def _kept(path: Path, step: int) -> list[str]:
    """The lines of a run before, up to the step that it goes on from (and without a last one cut short)."""
    if not path.is_file():
        return []
    kept = []
    for number, line in enumerate(read_text(path).splitlines(keepends=True), 1):
        if line.endswith("}\n"):
            record = parse(line, f"{path}, line {number}")
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f"{path}, line {number}: not what a training run writes there")
            if record["step"] <= step and "parameters" not in record:
                kept.append(line)
    return kept
