"""The beginning of a run, up to its first step: what it learns from, and the state from which it starts."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama_fn import random
from llama_fn.checkpoint.atomic import remove_leftovers
from llama_fn.checkpoint.load import TOKENIZER
from llama_fn.checkpoint.snapshot_pt import load_snapshot_pt
from llama_fn.mesh.world import World
from llama_fn.random import Key
from llama_fn.tokenizer import Tokenizer, load_tokenizer
from llama_fn.training.data import Corpus, open_corpus
from llama_fn.training.encode import DialogTokens
from llama_fn.training.loop import TrainState, init_state
from llama_fn.training.manifest import (
    FILES,
    Text,
    check_files,
    check_plan,
    check_texts,
    convert_files,
    digest_texts,
    file_of,
    is_prepared,
    read_manifest,
    write_manifest,
)
from llama_fn.training.placement import facts_of
from llama_fn.training.plan import Plan
from llama_fn.training.prepare import (
    ReportPreparing,
    clear,
    lowest_loss,
    prepare,
    sources_of_files,
    sources_of_stories,
)
from llama_fn.training.record import METRICS, kept_metrics, lines_until
from llama_fn.training.snapshots import SNAPSHOTS, newest_snapshot
from llama_fn.training.texts import text_files

OLD_SNAPSHOT = "snapshot.pt"  # of earlier versions


class Begun(NamedTuple):
    """A run before its next step.

    ``about`` is what every snapshot says about the run, ``kept`` the metrics so far, and ``seconds`` the time that the
    steps so far took. ``floor`` is the lowest possible validation loss, where it is known.
    """

    plan: Plan
    tokenizer: Tokenizer
    training: Corpus
    validation: Corpus
    batch_key: Key
    floor: dict[str, float]
    state: TrainState
    about: dict[str, Any]
    kept: bytes
    seconds: float


def begin(folder: Path, plan: Plan, texts: Path | None, resume: bool, device: torch.device | str | None,
          dialog_tokens: DialogTokens | None, preparing: ReportPreparing, world: World) -> Begun:
    """Begin a run in a folder, or find where it was stopped. The arguments and errors are those of `run`.

    Only one process may be at work in the folder; of a mesh, it is the first one, and the others read what it wrote.
    The plan has been filled from the manifest (`filled_plan`).
    """
    init_key, batch_key, *text_keys = random.split(random.key(plan.seed), 4)
    previous, known, of_stories = world.from_first(
        lambda: _prepared(folder, plan, texts, resume, text_keys, dialog_tokens, preparing, world))
    try:
        tokenizer = load_tokenizer(file_of(folder, TOKENIZER))
        plan = dataclasses.replace(plan, vocab_size=tokenizer.vocab_size)
        check_vocabulary(plan, world)
        training, validation = (open_corpus(folder / "data" / f"{part}.bin", tokenizer, plan.context,
                                            check=world.is_first) for part in ("train", "valid"))
        floor = {}
        if of_stories:
            floor["floor"] = world.from_first(lambda: lowest_loss(folder, tokenizer, text_keys[1], plan.context))
        fresh = init_state(world.init_params(init_key, plan.config(), device), plan.make_optimizer())
        state, kept, seconds = _found(folder, fresh, previous)
        if previous is not None:
            _check_steps(folder, previous, plan, int(state.step))
        manifest = world.from_first(lambda: write_manifest(folder, plan, known, previous, facts=facts_of(world)))
    except BaseException:
        if previous is None and world.is_first:
            clear(folder)
        raise
    return Begun(plan, tokenizer, training, validation, batch_key, floor, state,
                 {"plan": dataclasses.asdict(plan), "files": manifest["sha256"]}, kept, seconds)


def _prepared(folder: Path, plan: Plan, texts: Path | None, resume: bool, keys: Sequence[Key],
              dialog_tokens: DialogTokens | None,
              preparing: ReportPreparing,
              world: World) -> tuple[dict[str, Any] | None, Sequence[Text] | None, bool]:
    """Make the files that the run learns from, unless they are there.

    The results are the manifest of the run so far, the texts if they were given, and whether it learns from stories.
    """
    previous = read_manifest(folder, resume)
    files = None if texts is None else text_files(texts, folder.resolve())
    known = None if files is None or texts is None else digest_texts(files, texts)
    if previous is not None:
        check_plan(folder, previous, plan)
        if known is not None:
            check_texts(folder, previous, known)
    of_stories = texts is None if previous is None else previous.get("texts") is None
    sources = None
    if files is not None:
        sources = sources_of_files(files)
    elif of_stories:
        sources = sources_of_stories(plan.stories, *keys)
    try:
        for place in (folder, folder / "data", folder / SNAPSHOTS):
            remove_leftovers(place)
        if previous is None:
            write_manifest(folder, plan, known, None, files=(), facts=facts_of(world))
        elif not is_prepared(previous):  # it was killed while it made these files: make them all again
            clear(folder, FILES)
        present = [name for name in FILES if file_of(folder, name).is_file()]
        check_files(folder, previous, present)
        previous = convert_files(folder, previous)
        prepare(folder, plan.vocab_size, sources, dialog_tokens, preparing)
        check_files(folder, previous, {*FILES} - {*present})
    except BaseException:
        if previous is None:
            clear(folder)
        raise
    return previous, known, of_stories


def check_vocabulary(plan: Plan, world: World) -> None:
    """Raise `ValueError` if the vocabulary, whose size the texts have decided, cannot be divided over the mesh."""
    try:
        world.check(plan.config())
    except ValueError as error:
        raise ValueError(f"{error}; or choose another size of the vocabulary (--vocab-size)") from None


def filled_plan(folder: Path, plan: Plan, resume: bool) -> Plan:
    """The plan with the numbers of the run in the folder, or else the defaults, in the place of every None.

    Nothing is written. Raises the errors of `read_manifest`, and `ValueError` for numbers that make no run.
    """
    plan.check()
    previous = read_manifest(folder, resume)
    plan = (plan if previous is None else plan.continued(previous)).filled()
    plan.check()
    plan.make_optimizer()
    plan.config()
    return plan


def _found(folder: Path, fresh: TrainState, previous: dict[str, Any] | None) -> tuple[TrainState, bytes, float]:
    """The state, the metrics and the seconds of the newest whole snapshot; those of a new run if there is none."""
    found = newest_snapshot(folder, fresh, lambda about: _check_about(about, previous or {}))
    if found is not None:
        state, about = found
        return state, kept_metrics(folder / METRICS, about[METRICS]), about["seconds"]
    if (folder / OLD_SNAPSHOT).is_file():
        state = load_snapshot_pt(fresh, folder / OLD_SNAPSHOT)
        return state, lines_until(folder / METRICS, int(state.step)), 0.0
    return fresh, b"", 0.0


def _check_about(about: dict[str, Any], previous: dict[str, Any]) -> None:
    """Raise `ValueError` if a snapshot's manifest is not of the run with this manifest."""
    try:
        plan, files, _ = dict(about["plan"]), dict(about["files"]), about[METRICS]["bytes"] + about["seconds"]
    except (KeyError, TypeError, ValueError):
        raise ValueError("not the snapshot of a training run") from None
    changed = [f"{name} was {value!r}, is {previous[name]!r}" for name, value in plan.items()
               if name != "steps" and name in previous and previous[name] != value]
    digests = previous.get("sha256", {})
    changed += [f"{name} differs" for name, value in files.items() if name in digests and digests[name] != value]
    if changed:
        raise ValueError(f"of another run: {'; '.join(changed)}")


def _check_steps(folder: Path, previous: dict[str, Any], plan: Plan, taken: int) -> None:
    """Raise `ValueError` if the run has taken more steps already, and warn if its number of steps changes."""
    if plan.steps is not None and taken > plan.steps:
        raise ValueError(f"{folder} holds a run that has taken {taken} steps; it cannot end after {plan.steps}")
    if plan.steps != previous.get("steps"):
        warnings.warn(f"{folder}: a run of {previous.get('steps')} steps becomes one of {plan.steps}; from step "
                      f"{taken + 1} on the learning rate follows the schedule of the new number", stacklevel=4)
