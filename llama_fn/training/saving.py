"""Snapshots are written in the background, by a thread that has a copy of the state."""

import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from llama_fn import tree
from llama_fn.checkpoint.atomic import sync
from llama_fn.checkpoint.snapshot import save_snapshot
from llama_fn.mesh.ranks import ALONE, Ranks, agreed
from llama_fn.training.record import METRICS, MetricsFile
from llama_fn.training.snapshots import prune, snapshot_folder


class Saver:
    """Writes the snapshots of a run, one at a time, and keeps the last few and the best.

    A disk that cannot be written to does not stop the run: the first of several failures in a row is a warning, and the
    next snapshot is tried again. Any other error of the thread is raised in the run, by the next call. Use it in a
    ``with`` statement, at whose end the thread has ended. If the block is left because of Ctrl-C or `SystemExit`, a
    write that is still at work is given up; the snapshots before it are whole.

    On a mesh every process has a saver, with the same calls, and ``ranks`` of a group of their own
    (``all_ranks(apart=True)``), because the thread works beside the run. Each process writes its part of the state.
    Rank 0 writes the manifest and removes old snapshots. A failure of one process is one of all.
    """

    def __init__(self, run: Path, keep: int, ranks: Ranks = ALONE) -> None:
        self.run, self.keep, self.step, self.ranks = run, keep, -1, ranks
        self.pool = ThreadPoolExecutor(1, "snapshot")
        self.writing: Future | None = None
        self.given_up = threading.Event()
        self.error: OSError | None = None

    def save(self, state: Any, about: dict[str, Any], metrics: MetricsFile | None) -> None:
        """Copy the state and begin to write it; first wait for the write before, if it is still at work.

        ``about["step"]`` names the snapshot. A step that is saved already is not saved again. Rank 0 alone has
        ``metrics``.
        """
        self.wait()
        if about["step"] == self.step:
            return
        # The next step overwrites the memory of the state, so the copy is made before this returns.
        copy = tree.map(lambda x: torch.empty_like(x, device="cpu").copy_(x), state)
        about = {**about, METRICS: None if metrics is None else metrics.extent()}
        self.step = about["step"]
        try:
            agreed(lambda: None if metrics is None else metrics.flush(), self.ranks)
        except OSError as error:
            self._failed(error)
            return
        self.writing = self.pool.submit(self._write, copy, about)

    def look(self) -> None:
        """Say or raise what went wrong with a write that has ended. This does not wait."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until no write is at work. Afterwards ``error`` is the `OSError` of the last one, or None."""
        if self.writing is None:
            return
        try:
            self.writing.result()
        except OSError as error:
            self._failed(error)
        else:
            self.error = None
        self.writing = None

    def finish(self) -> None:
        """Wait until no write is at work, and raise the `OSError` of the last one, if it failed."""
        self.wait()
        if self.error is not None:
            raise self.error

    def _failed(self, error: OSError) -> None:
        if self.error is None and self.ranks.rank == 0:
            warnings.warn(f"no snapshot of step {self.step}: {error.filename}: {error.strerror}; the run goes on, and "
                          "tries again at the next snapshot", stacklevel=4)
        self.error, self.step = error, -1

    def _write(self, state: Any, about: dict[str, Any]) -> None:
        first = self.ranks.rank == 0
        # The measurements must reach the disk before the state does.
        agreed(lambda: sync(self.run / METRICS) if first else None, self.ranks)
        save_snapshot(state, snapshot_folder(self.run, about["step"]), about, self._go_on, self.ranks)
        agreed(lambda: prune(self.run, about["step"], self.keep) if first else None, self.ranks)

    def _go_on(self) -> None:
        if self.given_up.is_set():
            raise InterruptedError("given up")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self.given_up.set()
        self.pool.shutdown(wait=True)
        if error is None:
            self.wait()
