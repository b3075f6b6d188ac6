"""`tune`: fine-tune a model in a folder, with snapshots from which the run can be resumed.

The folder holds these files:

- ``finetune.json``: the numbers of the run, and digests of the model and of the examples.
- ``snapshots/``: the states to resume from.
- ``metrics.jsonl``: the measurements, one in each line.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fn import random, tree
from llama_fn.checkpoint.atomic import remove_leftovers
from llama_fn.checkpoint.files import write_json
from llama_fn.compiled.jit import jit
from llama_fn.mesh.sharded import is_sharded
from llama_fn.mesh.world import ALONE, World
from llama_fn.model.block import block
from llama_fn.model.transformer import Params
from llama_fn.ops.weight import whole_shape
from llama_fn.training.examples import Examples, batch, in_order
from llama_fn.training.finetune import Step, Task, adapter, adapters, begin, evaluate, full, step_of
from llama_fn.training.finetune_manifest import MANIFEST, check_about, check_manifest, manifest_of
from llama_fn.training.jit_step import jit_step
from llama_fn.training.lock import locked
from llama_fn.training.loop import TrainState, take_steps
from llama_fn.training.placement import facts_of, goes_on
from llama_fn.training.record import METRICS, kept_metrics
from llama_fn.training.snapshots import SNAPSHOTS, newest_snapshot
from llama_fn.training.step import Metrics, make_step
from llama_fn.training.supervise import supervise
from llama_fn.training.tuning import Tuning
from llama_fn.transforms import lora
from llama_fn.transforms.lora import Lora
from llama_fn.transforms.remat import remat

KEEP = 3  # snapshots
Batch = tuple[Tensor, Tensor]


def task_of(params: Params, tuning: Tuning, count: int = 1, start: Lora | None = None, world: World = ALONE) -> Task:
    """What a fine-tuning trains: all weights, a new adapter, the adapter ``start``, or ``count`` new adapters.

    The reference of direct preference optimization is the model as it is before the first step. Raises `ValueError`
    for numbers that do not go together.
    """
    beta = tuning.beta if tuning.dpo else None
    if start is not None:
        if tuning.rank is not None or count > 1:
            raise ValueError("an adapter that is given is trained further: leave out --rank, and --each")
        own = world.part(start)
        return adapter(params, own, beta, lora.apply(params, own))
    if tuning.rank is None:
        if count > 1:
            raise ValueError("only adapters are trained side by side: give their --rank")
        return full(params, beta)
    if count > 1 and world.mesh is not None:
        raise ValueError("adapters that are trained side by side (--each) are not divided over a mesh; train one")
    key = random.key(tuning.seed)
    made = [lora.init(each, params, tuning.rank, tuning.targets, alpha=tuning.alpha)
            for each in (random.split(key, count) if count > 1 else [key])]
    return adapters(params, lora.stack(made), beta) if count > 1 else adapter(params, world.part(made[0]), beta)


def tune(folder: Path, params: Params, data: Sequence[Examples], tuning: Tuning, *, valid: Sequence[Examples] = (),
         start: Lora | None = None, resume: bool = False, evaluate_every: int | None = None, compiled: bool = False,
         recompute: bool = False, report: Callable[[dict], None] = lambda record: None, world: World = ALONE) -> Any:
    """Fine-tune a model, with the run's files in a folder, and return what `Task.finish` makes of it.

    ``data`` has the examples of each adapter, or of the one model, and ``valid`` those to evaluate on. ``tuning`` is
    filled, and ``start`` is an adapter to train further. ``compiled`` compiles the step (see `step_for`), and
    ``recompute`` keeps only the inputs of each layer for the backward (see `remat`). ``report`` is called with each
    record, which is also appended to ``metrics.jsonl``. Snapshots, ``resume``, signals and ``world`` are those of
    `run`. On a mesh, ``params`` and the result are the parts that this process has, and ``start`` is whole.

    Raises `ValueError`, before any work, if the folder holds a run and ``resume`` is false, or another run.
    """
    world.check_rows(tuning.batch)
    task, optimizer, steps = task_of(params, tuning, len(data), start, world), tuning.optimizer(), tuning.steps
    assert steps is not None
    manifest = manifest_of(params, data, tuning, start)
    world.from_first(lambda: check_manifest(folder, manifest, resume or goes_on(folder / MANIFEST, world)))

    def prepare() -> None:
        for place in (folder, folder / SNAPSHOTS):
            remove_leftovers(place)
        write_json(folder / MANIFEST, {**manifest, **facts_of(world)})

    with contextlib.ExitStack() as held:
        world.from_first(lambda: held.enter_context(locked(folder)))
        world.from_first(prepare)
        state, kept, seconds = begin(task, optimizer), b"", 0.0
        found = newest_snapshot(folder, state, lambda about: check_about(about, manifest))
        if found is not None:
            state, about = found
            kept, seconds = kept_metrics(folder / METRICS, about[METRICS]), about.get("seconds", 0.0)
        keys = random.split(random.fold_in(random.key(tuning.seed), 1), len(data))
        every = max(1, steps // 4) if evaluate_every is None else evaluate_every
        step, device = step_for(task, optimizer, compiled=compiled, recompute=recompute), params.embedding.device

        def batch_of(number: int) -> Batch:
            shape = tuning.micro_batches, tuning.batch
            together = _together(task, [batch(one, key, number, shape) for one, key in zip(data, keys, strict=True)])
            return world.rows(together, axis=1)

        def evaluation(state: TrainState) -> dict[str, Any]:
            if not valid:
                return {}
            losses = evaluate(task, state.params, _batches(task, valid, tuning.batch, device, world))
            return {"valid_loss": losses if task.many else losses[0]}

        trained = sum(math.prod(whole_shape(x)) for x in tree.leaves(task.trained, is_sharded))
        first = {"step": int(state.step), "steps": steps, "parameters": trained,
                 "examples": sum(len(one.tokens) for one in data)}
        taken = take_steps(state, step, batch_of, steps, device)
        state = supervise(folder, state, taken, first=first, step_record=_step_record, evaluation=evaluation,
                          steps=steps, every=every, about={"run": manifest}, seconds=seconds, kept=kept, keep=KEEP,
                          report=report, world=world)
    return task.finish(state.params)


def _step_record(state: TrainState, metrics: Metrics, interval: float, seconds: float) -> dict[str, Any]:
    """The loss and the gradient's norm, one number or a list, and how many tokens (or pairs) were learned a second."""
    return {"loss": metrics.loss.tolist(), "grad_norm": metrics.grad_norm.tolist(),
            "learned_per_second": round(int(metrics.count.sum()) / interval, 1), "seconds": round(seconds, 2)}


def step_for(task: Task, optimizer: Any, *, compiled: bool = False, recompute: bool = False) -> Step:
    """The step of a task, with the trees that stay as they are bound to it.

    A compiled step is compiled by its parts (`jit_step`); that of several adapters, as one graph.
    """
    layer = remat(block) if recompute else block
    if compiled and task.many:
        step = jit(step_of(task, optimizer, layer=layer), donate=("params", "opt_state"))
    else:
        step = step_of(task, optimizer, layer=layer, make=jit_step if compiled else make_step)
    return lambda params, opt_state, tokens, mask: step(params, opt_state, tokens, mask, task.frozen)


def _batches(task: Task, valid: Sequence[Examples], size: int, device: torch.device,
             world: World) -> list[Batch]:
    """The examples to evaluate on, in order, and those of several adapters filled up to one number."""
    most = -(-max(len(one.tokens) for one in valid) // world.row_parts) * world.row_parts
    parts = [in_order(Examples(_padded(one.tokens, most), _padded(one.mask, most)), size) for one in valid]
    together = (world.rows(_together(task, some)) for some in zip(*parts, strict=True))
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
