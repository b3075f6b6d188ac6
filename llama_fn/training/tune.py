"""`tune`: fine-tune a model in a folder, with snapshots from which the run can be resumed.

The folder holds these files:

- ``finetune.json``: the numbers of the run, and digests of the model and of the examples.
- ``snapshots/``: the states to resume from.
- ``metrics.jsonl``: the measurements, one in each line.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fn import random, tree
from llama_fn.checkpoint.atomic import remove_leftovers
from llama_fn.checkpoint.files import write_json
from llama_fn.compiled.jit import jit
from llama_fn.model.block import block
from llama_fn.model.transformer import Params
from llama_fn.text import read_json
from llama_fn.training.examples import Examples, batch, in_order
from llama_fn.training.finetune import Step, Task, adapter, adapters, begin, evaluate, full, step_of
from llama_fn.training.guarded import is_finite
from llama_fn.training.lock import LOCK, locked
from llama_fn.training.loop import TrainState, take_steps
from llama_fn.training.record import METRICS, MetricsFile, kept_metrics
from llama_fn.training.saving import Saver
from llama_fn.training.snapshots import SNAPSHOTS, newest_snapshot
from llama_fn.training.step import Metrics
from llama_fn.training.stopping import signals_noted, stop, terminal_may_close
from llama_fn.training.tuning import Tuning
from llama_fn.transforms import lora
from llama_fn.transforms.lora import Lora
from llama_fn.transforms.remat import remat

MANIFEST = "finetune.json"
KEEP = 3  # snapshots
Batch = tuple[Tensor, Tensor]


def task_of(params: Params, tuning: Tuning, count: int = 1, start: Lora | None = None) -> Task:
    """What a fine-tuning trains: all weights, a new adapter, the adapter ``start``, or ``count`` new adapters.

    The reference of direct preference optimization is the model as it is before the first step. Raises `ValueError`
    for numbers that do not go together.
    """
    beta = tuning.beta if tuning.dpo else None
    if start is not None:
        if tuning.rank is not None or count > 1:
            raise ValueError("an adapter that is given is trained further: leave out --rank, and --each")
        return adapter(params, start, beta, lora.apply(params, start))
    if tuning.rank is None:
        if count > 1:
            raise ValueError("only adapters are trained side by side: give their --rank")
        return full(params, beta)
    key = random.key(tuning.seed)
    made = [lora.init(each, params, tuning.rank, tuning.targets, alpha=tuning.alpha)
            for each in (random.split(key, count) if count > 1 else [key])]
    return adapters(params, lora.stack(made), beta) if count > 1 else adapter(params, made[0], beta)


def tune(folder: Path, params: Params, data: Sequence[Examples], tuning: Tuning, *, valid: Sequence[Examples] = (),
         start: Lora | None = None, resume: bool = False, evaluate_every: int | None = None, compiled: bool = False,
         recompute: bool = False, report: Callable[[dict], None] = lambda record: None) -> Any:
    """Fine-tune a model, with the run's files in a folder, and return what `Task.finish` makes of it.

    ``data`` has the examples of each adapter, or of the one model, and ``valid`` those to evaluate on. ``tuning`` is
    filled, and ``start`` is an adapter to train further. ``compiled`` compiles the step as one graph, and
    ``recompute`` keeps only the inputs of each layer for the backward (see `remat`). ``report`` is called with each
    record, which is also appended to ``metrics.jsonl``. Snapshots, ``resume`` and signals are those of `run`.

    Raises `ValueError`, before any work, if the folder holds a run and ``resume`` is false, or another run.
    """
    task, optimizer, steps = task_of(params, tuning, len(data), start), tuning.optimizer(), tuning.steps
    assert steps is not None
    manifest = {**dataclasses.asdict(tuning), "model": _digest(tree.leaves(params)),
                "start": None if start is None else _digest(tree.leaves(start)),
                "examples": _digest([x for one in data for x in one])}
    _check(folder, manifest, resume)
    with locked(folder):
        for place in (folder, folder / SNAPSHOTS):
            remove_leftovers(place)
        write_json(folder / MANIFEST, manifest)
        about = {"run": manifest}
        state, kept = begin(task, optimizer), b""
        found = newest_snapshot(folder, state, lambda about: _check_about(about, manifest))
        if found is not None:
            state, kept = found[0], kept_metrics(folder / METRICS, found[1][METRICS])
        keys = random.split(random.fold_in(random.key(tuning.seed), 1), len(data))
        every = max(1, steps // 4) if evaluate_every is None else evaluate_every
        step, device = _step(task, optimizer, compiled, recompute), params.embedding.device

        def batch_of(number: int) -> Batch:
            shape = tuning.micro_batches, tuning.batch
            return _together(task, [batch(one, key, number, shape) for one, key in zip(data, keys, strict=True)])

        def validate(state: TrainState) -> dict[str, Any]:
            if not valid:
                return {}
            losses = evaluate(task, state.params, _batches(task, valid, tuning.batch, device))
            return {"valid_loss": losses if task.many else losses[0]}

        trained = sum(x.numel() for x in tree.leaves(task.trained))
        first = {"step": int(state.step), "steps": steps, "parameters": trained,
                 "examples": sum(len(one.tokens) for one in data)}
        with contextlib.closing(MetricsFile(folder / METRICS, kept)) as metrics, Saver(folder, KEEP) as saver:
            if not kept:
                metrics.append(first)
            report(first)
            taken = take_steps(state, step, batch_of, steps, device)
            state = _run(state, taken, steps, every, validate, about, metrics, saver, report)
    return task.finish(state.params)


def _run(state: TrainState, taken: Iterable[tuple[TrainState, Metrics]], steps: int, every: int,
         validate: Callable[[TrainState], dict[str, Any]], about: dict[str, Any], metrics: MetricsFile, saver: Saver,
         report: Callable[[dict], None]) -> TrainState:
    """Take all steps that are left, with evaluations and snapshots, and return the last state."""
    loss: dict[str, Any] = {}

    def save_state() -> None:
        saver.save(state, {**about, "step": int(state.step), **loss}, metrics)

    with signals_noted() as signals:
        def log(record: dict[str, Any]) -> None:
            metrics.append(record)
            with terminal_may_close(signals):
                report(record)

        begun = since = time.perf_counter()
        for state, measured in taken:
            number, now, loss = int(state.step), time.perf_counter(), {}
            log({"step": number, "loss": measured.loss.tolist(), "grad_norm": measured.grad_norm.tolist(),
                 "learned_per_second": round(int(measured.count.sum()) / (now - since), 1),
                 "seconds": round(now - begun, 2), **({} if is_finite(measured).all() else {"skipped": True})})
            if number % every == 0 or number == steps:
                loss = validate(state)
                if loss:
                    log({"step": number, **loss})
                save_state()
            saver.look()
            if signals:
                save_state()
                saver.finish()
                stop(signals[0])
            since = time.perf_counter()  # leaves out the evaluation
        saver.wait()
    return state


def _check_about(about: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise `ValueError` if a snapshot is not of the run with this manifest."""
    of = about.get("run")
    if not isinstance(of, dict) or _changed(of, manifest) or METRICS not in about:
        raise ValueError("of another run")


def _step(task: Task, optimizer: Any, compiled: bool, recompute: bool) -> Step:
    """The step of a task, with the trees that stay as they are bound to it."""
    step = step_of(task, optimizer, layer=remat(block) if recompute else block)
    step = jit(step, donate=("params", "opt_state")) if compiled else step
    return lambda params, opt_state, tokens, mask: step(params, opt_state, tokens, mask, task.frozen)


def _batches(task: Task, valid: Sequence[Examples], size: int, device: torch.device) -> list[Batch]:
    """The examples to evaluate on, in order, and those of several adapters filled up to one number."""
    most = max(len(one.tokens) for one in valid)
    parts = [in_order(Examples(_padded(one.tokens, most), _padded(one.mask, most)), size) for one in valid]
    together = (_together(task, some) for some in zip(*parts, strict=True))
    return [(tokens.to(device), mask.to(device)) for tokens, mask in together]


def _together(task: Task, parts: Sequence[Examples]) -> Batch:
    """The rows of each adapter as one tensor, padded to one length; the rows of one model as they are."""
    if not task.many:
        return parts[0].tokens, parts[0].mask
    length = max(part.tokens.shape[-1] for part in parts)
    tokens, mask = ([torch.nn.functional.pad(x, (0, length - x.shape[-1])) for x in some]
                    for some in zip(*parts, strict=True))
    return torch.stack(tokens), torch.stack(mask)


def _padded(x: Tensor, count: int) -> Tensor:
    """`x` with zeros behind its first axis: tokens that do not count."""
    return torch.cat([x, x.new_zeros(count - len(x), *x.shape[1:])])


def _check(folder: Path, manifest: dict, resume: bool) -> None:
    """Raise `ValueError` if the folder holds another run, or one that is not to be resumed, or something else."""
    file = folder / MANIFEST
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(place.name != LOCK for place in folder.iterdir())):
            raise ValueError(f"{folder} is not empty and holds no fine-tuning; choose another folder")
        if resume:
            raise FileNotFoundError(f"{folder}: there is no run to go on with")
        return
    if not resume:
        raise ValueError(f"{folder} holds a fine-tuning already; go on with it (resume), or choose another folder")
    before = read_json(file)
    before = before if isinstance(before, dict) else {}
    if changed := _changed(before, manifest):
        raise ValueError(f"{folder} holds a run with another {', '.join(changed)}; give the same options, model and "
                         "examples, or choose another folder")
    if before.get("steps") != manifest["steps"]:
        warnings.warn(f"{folder}: a run of {before.get('steps')} steps becomes one of {manifest['steps']}",
                      stacklevel=3)


def _changed(before: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """The names of what differs from the run before, but for the number of steps."""
    now = json.loads(json.dumps(manifest))
    return [name for name, value in now.items() if name != "steps" and before.get(name) != value]


def _digest(tensors: Sequence[Tensor]) -> str:
    """A digest of the shapes and numbers of tensors."""
    whole = hashlib.sha256()
    for x in tensors:
        whole.update(str((x.dtype, tuple(x.shape))).encode())
        whole.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
