"""A training run in a folder: tokenizer, encoded corpus, metrics, snapshots, and at the end a model that `load` reads.

    tokenizer.model  params.json  consolidated.00.pth     the model, after the last step
    data/train.bin   data/valid.bin                       the texts as tokens
    run.json         snapshot.pt  metrics.jsonl           the plan, the state to go on from, a line a measurement
"""

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import torch

from llama_fn import random, stories
from llama_fn.checkpoint.atomic import appending, current, replacing, sync
from llama_fn.checkpoint.files import read_json, write_json
from llama_fn.checkpoint.load import TOKENIZER, Model, save
from llama_fn.checkpoint.snapshot import load_snapshot, save_snapshot
from llama_fn.model.init import init_params
from llama_fn.random import Key
from llama_fn.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llama_fn.training.data import encode_corpus, open_corpus, read_texts
from llama_fn.training.loop import TrainState, evaluate, init_state, train
from llama_fn.training.plan import Plan

Report = Callable[[dict], None]
VALIDATION_STORIES = 1000


def run(folder: str | os.PathLike, plan: Plan, texts: str | os.PathLike | None = None, *, resume: bool = False,
        evaluate_every: int = 500, device: torch.device | str | None = None,
        report: Report = lambda record: None) -> Model:
    """Train a model on `texts` (a file or folder, see `read_texts`; None for the embedded stories) and save it.

    `report` gets a record before the first step (which compiles for a while), one a step, and one with `valid_loss` at
    every evaluation; the same go to `metrics.jsonl`.
    A state is written at every evaluation and when the run is interrupted; `resume` goes on from it, to the same
    result, bit for bit, as a run that never stopped.

    Raises `ValueError` if the folder holds a run already and `resume` is not set, or holds one of another plan.
    """
    if evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1, got {evaluate_every}")
    plan.check()
    folder, config, optimizer = Path(folder), plan.config(), plan.optimizer()
    if texts is not None:
        next(read_texts(texts))  # before any work
    settings = {**dataclasses.asdict(plan), "texts": None if texts is None else os.path.basename(os.fspath(texts))}
    _check_folder(folder, settings, resume)
    init, order, told, held_out = random.split(random.key(plan.seed), 4)
    try:
        tokenizer, floor = _prepare(folder, plan, texts, told, held_out)
        write_json(folder / "run.json", settings)
    except BaseException:
        if not resume:
            _clear(folder)
        raise
    training, validation = (open_corpus(folder / "data" / f"{part}.bin", tokenizer, plan.context)
                            for part in ("train", "valid"))

    state = init_state(init_params(init, config, device=device), optimizer)
    if resume and (folder / "snapshot.pt").is_file():
        state = load_snapshot(state, folder / "snapshot.pt")
    kept = _kept(folder / "metrics.jsonl", int(state.step))
    with appending(folder / "metrics.jsonl", "".join(kept)) as write:
        def log(record: dict) -> None:
            write(json.dumps(record) + "\n")
            report(record)

        def keep(state: TrainState) -> None:  # a state on the disk has its measurements there, too
            sync(folder / "metrics.jsonl")
            save_snapshot(state, folder / "snapshot.pt")

        log({"step": int(state.step), "parameters": config.n_params, "training_tokens": len(training.tokens)})
        begun = since = time.perf_counter()
        tokens, seconds, first = 0, 0.0, True  # of the steps after the first, which compiles
        with _interrupts() as interrupted:
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
                if step % evaluate_every == 0 or step == plan.steps:
                    log({"step": step, "valid_loss": evaluate(state.params, validation), **floor})
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

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _check_folder(folder: Path, settings: dict, resume: bool) -> None:
    if (folder / "run.json").is_file():
        if not resume:
            raise ValueError(f"{folder} holds a training run already; go on with it (resume), or choose another folder")
        before = read_json(folder / "run.json")
        if changed := [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in settings.items() if before.get(k) != v]:
            raise ValueError(f"{folder} holds a run of another plan: {'; '.join(changed)}")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no training run; choose another folder")
    elif resume:
        raise FileNotFoundError(f"{folder}: there is no run to go on with")


def _clear(folder: Path) -> None:
    """Leave nothing half-made: remove what `_prepare` makes, and nothing else."""
    for name in (TOKENIZER, "data/train.bin", "data/valid.bin"):
        (folder / name).unlink(missing_ok=True)
    for part in (folder / "data", folder):
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()


def _prepare(folder: Path, plan: Plan, texts: str | os.PathLike | None, told: Key,
             held_out: Key) -> tuple[Tokenizer, dict]:
    """The tokenizer and the encoded texts, made unless they are there; and the lowest possible loss, where known."""
    def training() -> Iterator[str]:
        if texts is not None:
            return _split(read_texts(texts), last=False)
        return (story.text for story in stories.stories(told, plan.stories))

    def validation() -> Iterable[str]:
        if texts is not None:
            return _split(read_texts(texts), last=True)
        return (story.text for story in stories.stories(held_out, VALIDATION_STORIES))

    if not (current(folder) / TOKENIZER).is_file():
        enough = training() if texts is not None else islice(training(), 5000)
        with replacing(folder / TOKENIZER) as beside:
            beside.write_bytes(train_tokenizer(enough, plan.vocab_size).model)
    tokenizer = load_tokenizer(current(folder) / TOKENIZER)
    for name, part in (("train", training), ("valid", validation)):
        if not (folder / "data" / f"{name}.bin").is_file():
            encode_corpus(part(), tokenizer, folder / "data" / f"{name}.bin")
    if texts is not None:
        return tokenizer, {}
    corpus = open_corpus(folder / "data" / "valid.bin", tokenizer, plan.context)
    bits = sum(story.bits for story in stories.stories(held_out, VALIDATION_STORIES))
    return tokenizer, {"floor": bits * math.log(2) / int(corpus.lengths.sum())}


def _split(texts: Iterator[str], last: bool) -> Iterator[str]:
    """Training texts, or held-out ones: every twentieth. Of fewer than 20, the last twentieth of each is held out."""
    few = list(islice(texts, 20))
    if len(few) == 20:
        yield from (text for i, text in enumerate(chain(few, texts)) if (i % 20 == 19) is last)
        return
    for text in few:
        cut = len(text) * 19 // 20
        line = text.rfind("\n", cut * 9 // 10, cut) + 1  # a line's beginning, if there is one not far before
        yield text[line or cut:] if last else text[:line or cut]


def _kept(path: Path, step: int) -> list[str]:
    """The lines of a run before, up to the step that it goes on from (and without a last one cut short)."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    return [line for line in lines if json.loads(line)["step"] <= step and "parameters" not in line]
