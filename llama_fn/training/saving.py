"""Snapshots are written in the background, by a thread that has a copy of the state."""

import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_fn.checkpoint.atomic import sync
from llama_fn.checkpoint.snapshot import save_snapshot
from llama_fn.mesh.world import ALONE, World
from llama_fn.training.record import METRICS, MetricsFile, Unwritten
from llama_fn.training.snapshots import prune, snapshot_folder


class Saver:
    """Writes the snapshots of a run, one at a time, and keeps the last few and the best.

    A disk that cannot be written to does not stop the run: the first of several failures in a row is a warning, and the
    next snapshot is tried again. Any other error of the thread is raised in the run, by the next call. Use it in a
    ``with`` statement, at whose end the thread has ended. If the block is left because of Ctrl-C or `SystemExit`, a
    write that is still at work is given up; the snapshots before it are whole.

    All processes of a mesh call it. The first one collects the state and writes.
    """

    def __init__(self, run: Path, keep: int, world: World = ALONE) -> None:
        self.run, self.keep, self.world, self.step = run, keep, world, -1
        self.pool = ThreadPoolExecutor(1, "snapshot")
        self.writing: Future | None = None
        self.given_up = threading.Event()
        self.error: OSError | None = None

    def save(self, state: Any, about: dict[str, Any], metrics: MetricsFile | Unwritten) -> None:
        """Copy the state and begin to write it; first wait for the write before, if it is still at work.

        ``about["step"]`` names the snapshot. A step that is saved already is not saved again.
        """
        if self.world.from_first(lambda: self._is_saved(about["step"])):
            return
        # The next step overwrites the memory of the state, so the copy is made before this returns.
        copy = self.world.on_first(state)
        if not self.world.is_first:
            return
        about = {**about, METRICS: metrics.extent()}
        self.step = about["step"]
        try:
            metrics.flush()
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
        self.world.from_first(self._finish)

    def _finish(self) -> None:
        self.wait()
        if self.error is not None:
            raise self.error

    def _is_saved(self, step: int) -> bool:
        """Whether the snapshot of a step is written; no write is at work then."""
        self.wait()
        return step == self.step

    def _failed(self, error: OSError) -> None:
        if self.error is None:
            warnings.warn(f"no snapshot of step {self.step}: {error.filename}: {error.strerror}; the run goes on, and "
                          "tries again at the next snapshot", stacklevel=4)
        self.error, self.step = error, -1

    def _write(self, state: Any, about: dict[str, Any]) -> None:
        sync(self.run / METRICS)  # the measurements must reach the disk before the state does
        save_snapshot(state, snapshot_folder(self.run, about["step"]), about, self._go_on)
        prune(self.run, about["step"], self.keep)

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
