"""What a run does beside its steps: it measures, evaluates, saves, and stops when a signal asks for it."""

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llama_fn.mesh.world import ALONE, World
from llama_fn.training.guarded import is_finite
from llama_fn.training.loop import TrainState
from llama_fn.training.record import METRICS, MetricsFile
from llama_fn.training.saving import Saver
from llama_fn.training.step import Metrics
from llama_fn.training.stopping import signals_noted, stop, terminal_may_close

Record = dict[str, Any]


def no_samples(state: TrainState) -> Iterable[Record]:
    """The samples of a run that draws none."""
    return ()


def supervise(folder: Path, state: TrainState, taken: Iterable[tuple[TrainState, Metrics]], *, first: Record,
              step_record: Callable[[TrainState, Metrics, float, float], Record],
              evaluation: Callable[[TrainState], Record],
              samples: Callable[[TrainState], Iterable[Record]] = no_samples, steps: int, every: int, about: Record,
              seconds: float, kept: bytes, keep: int, report: Callable[[Record], None],
              world: World = ALONE) -> TrainState:
    """Go through the steps of a run in a folder, and return the last state.

    ``taken`` has the state and the metrics after each step, and ``state`` is the one before. ``first`` is reported
    before the first step. Then ``step_record(state, metrics, interval, seconds)`` is the record of a step, where
    ``interval`` is the time of this step, and ``seconds`` the time of all steps so far, evaluations left out.
    ``evaluation(state)`` is that of an evaluation, after every ``every`` steps and after step number ``steps``; and
    ``samples(state)`` are those of texts, which are asked for after each step. Every record is appended to
    ``metrics.jsonl``, whose contents so far are ``kept``, and given to ``report``.

    A snapshot is written in the background after every evaluation, with ``about``, the evaluation and the seconds in
    its manifest; the last ``keep`` are kept, and the best. A disk that cannot be written to does not stop the run. The
    first SIGINT, SIGTERM or SIGHUP lets the current step finish; then its state is saved, and `stop` raises. After a
    signal, a ``report`` that fails is no error, because the terminal may be closed.

    The processes of a mesh stop after the same step, whichever of them got the signal. The first one writes the files.
    """
    evaluated: Record = {}
    file = contextlib.closing(MetricsFile(folder / METRICS, kept)) if world.is_first else contextlib.nullcontext()
    with file as metrics, Saver(folder, keep, world.apart()) as saver, signals_noted() as signals, world.watched():
        def tell(record: Record) -> None:
            if world.is_first:
                with terminal_may_close(signals):
                    report(record)

        def log(record: Record) -> None:
            if metrics is not None:
                metrics.append(record)
            tell(record)

        def save() -> None:
            saver.save(state, {**about, "step": int(state.step), "seconds": seconds, **evaluated}, metrics)

        (tell if kept else log)(first)
        since = time.perf_counter()
        for state, measured in taken:
            number, finite = int(state.step), bool(is_finite(measured).all())  # this waits until the step is computed
            took = time.perf_counter() - since
            seconds, evaluated = seconds + took, {}
            skipped = {} if finite else {"skipped": True}
            log({"step": number, **step_record(state, measured, took, seconds), **skipped})
            for record in samples(state):
                log({"step": number, **record})
            if number % every == 0 or number == steps:
                evaluated = evaluation(state)
                if evaluated:
                    log({"step": number, **evaluated})
                save()
            saver.look()
            if signal := world.largest(signals[0] if signals else 0):
                save()
                saver.finish()
                stop(signal)
            since = time.perf_counter()  # leaves out the evaluation and the samples
        saver.wait()
    return state
