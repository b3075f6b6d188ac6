"""The snapshots of a run: one folder for each, ``snapshots/step-00001000``, named by its step."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llama_fn.checkpoint.atomic import remove_folder, remove_leftovers, sync
from llama_fn.checkpoint.snapshot import load_snapshot, read_about
from llama_fn.mesh.ranks import agreed, ranks_of

T = TypeVar("T")

SNAPSHOTS = "snapshots"


def snapshot_folder(run: Path, step: int) -> Path:
    """The folder of the snapshot after a step."""
    return run / SNAPSHOTS / f"step-{step:08}"


def snapshot_steps(run: Path) -> list[int]:
    """The steps of all snapshots in a run's folder, whole or damaged, in order."""
    names = [place.name for place in (run / SNAPSHOTS).iterdir()] if (run / SNAPSHOTS).is_dir() else []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d{8,})", name)))


def newest_snapshot(run: Path, like: T, check: Callable[[dict[str, Any]], None]) -> tuple[T, dict[str, Any]] | None:
    """The state and the ``about`` of the newest whole snapshot; None if there are no snapshots.

    A snapshot is whole if every digest in it is right and ``check(about)`` raises no `ValueError`. One warning names
    the newer ones that were skipped, and why. Raises `ValueError` if there are snapshots but none is whole: to begin
    anew then would lose the run in silence.

    If ``like`` has sharded leaves, all processes must call this. They find the same snapshot, and rank 0 warns.
    """
    skipped, ranks = [], ranks_of(like)

    def checked(folder: Path, step: int) -> dict[str, Any]:
        about = read_about(folder)
        if about.get("step") != step:
            raise ValueError(f"{folder}: its manifest is that of step {about.get('step')}")
        check(about)
        return about

    for step in reversed(agreed(lambda: snapshot_steps(run), ranks)[0]):
        folder = snapshot_folder(run, step)
        try:
            about = agreed(lambda folder=folder, step=step: checked(folder, step), ranks)[0]
            state = load_snapshot(like, folder)
        except (ValueError, FileNotFoundError) as error:
            reason = " ".join(str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "").split())
            skipped.append(f"{folder.name} ({reason})")
            continue
        if skipped and ranks.rank == 0:
            warnings.warn(f"{run / SNAPSHOTS}: skipped {', '.join(skipped)}; the run goes on from step {step}",
                          stacklevel=3)
        return state, about
    if skipped:
        raise ValueError(f"{run / SNAPSHOTS}: no snapshot is whole: {', '.join(skipped)}; put back a whole one, or "
                         "remove that folder to begin anew with step 1")
    return None


def prune(run: Path, step: int, keep: int) -> None:
    """Remove the snapshots that are not to be kept, after that of ``step`` was written.

    The last ``keep`` are kept, and the one with the lowest validation loss. Snapshots of later steps are removed, too:
    the run came from an earlier one because these were damaged. Everything that a killed writer left is removed.
    """
    steps = [other for other in snapshot_steps(run) if other <= step]
    losses = {other: loss for other in steps if (loss := _validation_loss(run, other)) is not None}
    kept = {*steps[-keep:], *([min(losses, key=lambda other: losses[other])] if losses else [])}
    for other in {*snapshot_steps(run)} - kept:
        remove_folder(snapshot_folder(run, other))
    remove_leftovers(run / SNAPSHOTS)
    sync(run / SNAPSHOTS)


def _validation_loss(run: Path, step: int) -> float | None:
    """The validation loss in the manifest of a snapshot; None if there is none, or if the manifest is damaged."""
    try:
        loss = read_about(snapshot_folder(run, step)).get("valid_loss")
    except (ValueError, OSError):
        return None
    return loss if isinstance(loss, float) and loss == loss else None
