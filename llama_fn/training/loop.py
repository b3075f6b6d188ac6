"""The training loop and the evaluation.

The batch of a step depends on the key and the step's number alone. Therefore a run that stops and continues later
gives the same bits as a run that never stopped.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from llama_fn import tree
from llama_fn.mesh.world import ALONE, World
from llama_fn.model.transformer import Params
from llama_fn.random import Key
from llama_fn.training.data import Batch, Corpus, batch, rows
from llama_fn.training.guarded import guarded, is_finite
from llama_fn.training.jit_step import jit_step
from llama_fn.training.loss import loss_sum
from llama_fn.training.optim import Optimizer
from llama_fn.training.step import Metrics, make_update


class TrainState(NamedTuple):
    """All that a run needs to continue: parameters, the optimizer's state, and the number of steps taken."""

    params: Any  # `Params`, or another tree that is trained, such as an adapter
    opt_state: Any
    step: Int[Tensor, ""]


def init_state(params: Any, optimizer: Optimizer) -> TrainState:
    """The state before the first step.

    It holds a copy of the parameters, because training updates its state in place.
    """
    step = torch.zeros((), dtype=torch.int64, device="cpu")
    return TrainState(tree.map(torch.clone, params), optimizer.init(params), step)


def train(state: TrainState, optimizer: Optimizer, corpus: Corpus, key: Key, steps: int,
          shape: tuple[int, int], most_skipped: int = 10,
          world: World = ALONE) -> Iterator[tuple[TrainState, Metrics]]:
    """Train up to step number ``steps``, and yield the state and the metrics after each step.

    ``shape`` is (micro-batches, rows of each). On a mesh, each process has its part of the state, and takes its rows
    of the same batch. The step is compiled when it first runs, which takes a while. It
    donates the state: each new state takes over the memory of the one before, which is no longer valid. A step whose
    loss or gradient norm is infinite or NaN leaves parameters and optimizer state as they are (see `guarded`). Raises
    `ValueError` at ``most_skipped`` of them in a row.

    Example: ``for state, metrics in train(state, optimizer, corpus, lf.random.key(0), 100, (1, 32)): ...``.
    """
    step = jit_step(optimizer, update=lambda optimizer: guarded(make_update(optimizer)))
    device = tree.leaves(state.params)[0].device

    def batch_of(number: int) -> Batch:
        return world.rows(batch(corpus, key, number, shape), axis=1)

    return take_steps(state, step, batch_of, steps, device, most_skipped)


def take_steps(state: TrainState, step: Callable, batch_of: Callable[[int], Iterable[Tensor | None]], steps: int,
               device: torch.device, most_skipped: int = 10) -> Iterator[tuple[TrainState, Metrics]]:
    """Take steps up to number ``steps``, and yield the state and the metrics after each.

    ``step(params, opt_state, *batch)`` is one step, and ``batch_of(number)`` is its batch: tokens, mask and, of packed
    rows, segments.
    Raises `ValueError` after ``most_skipped`` steps in a row whose loss or gradient norm is not finite.
    """
    skipped = 0
    for number in range(int(state.step), steps):
        with deterministic():
            params, opt_state, metrics = step(state.params, state.opt_state,
                                              *tree.map(lambda x: x.to(device), batch_of(number)))
        state = TrainState(params, opt_state, state.step + 1)
        skipped = 0 if is_finite(metrics).all() else skipped + 1
        if skipped == most_skipped:
            raise ValueError(f"step {number + 1}: the loss is {metrics.loss.tolist()} and the gradient's norm "
                             f"{metrics.grad_norm.tolist()}, not finite for {skipped} steps in a row; the last "
                             "snapshot is as it was: go on from it with a lower learning rate or a longer warmup")
        yield state, metrics


def updates_taken(opt_state: Any) -> int:
    """The number of updates that an optimizer has made, which is what its learning rate depends on.

    It is the largest count in the state. Steps that were skipped are not among them.
    """
    counts = [int(x) for x in tree.leaves(opt_state) if x.ndim == 0 and not x.is_floating_point()]
    return max(counts, default=0)


@contextmanager
def deterministic() -> Iterator[None]:
    """A context manager in which torch uses deterministic kernels: the same arguments give the same bits.

    Without it, several threads add up the embedding's gradient in an order that changes from run to run.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires this on CUDA
    memory: Any = torch.utils.deterministic  # torch sets the attribute below in a way that type checkers do not see
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
              memory.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # filling helps to find bugs, but costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]


@torch.no_grad()
def evaluate(params: Params, corpus: Corpus, size: int = 32, world: World = ALONE) -> float:
    """The mean loss over all tokens of a corpus, in nats per token.

    Each token is predicted from the tokens before it in its row. ``size`` is the number of rows in each call of the
    model; the result does not depend on it, up to rounding.
    """
    device = params.embedding.device
    size = -(-size // world.row_parts) * world.row_parts
    losses = [loss_sum(params, *tree.map(lambda x: x.to(device), world.rows(some))) for some in rows(corpus, size)]
    return float(sum(total for total, _ in losses) / sum(count for _, count in losses))
