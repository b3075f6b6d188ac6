"""The loop: steps over batches that are a function of key and step, so that a run can stop and go on bit for bit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from llama_fn import tree
from llama_fn.model.transformer import Params
from llama_fn.random import Key
from llama_fn.training.data import Corpus, batch, rows
from llama_fn.training.jit_step import jit_step
from llama_fn.training.loss import loss_sum
from llama_fn.training.optim import Optimizer
from llama_fn.training.step import Metrics


class TrainState(NamedTuple):
    """All that a run needs to go on: a tree like any other."""

    params: Params
    opt_state: Any
    step: Int[Tensor, ""]


def init_state(params: Params, optimizer: Optimizer) -> TrainState:
    """The state before the first step, with a copy of the parameters (training updates its state in place)."""
    step = torch.zeros((), dtype=torch.int64, device="cpu")
    return TrainState(tree.map(torch.clone, params), optimizer.init(params), step)


def train(state: TrainState, optimizer: Optimizer, corpus: Corpus, key: Key, steps: int,
          shape: tuple[int, int]) -> Iterator[tuple[TrainState, Metrics]]:
    """The states after each step up to number `steps`, with their metrics; `shape` is (micro-batches, rows of each).

    A step is compiled once (with the first state, which takes a while) and donates the state: each one that comes out
    takes the memory of the one before. Raises `ValueError` at the first loss that is not a number.
    """
    step = jit_step(optimizer)
    for number in range(int(state.step), steps):
        tokens, mask = (x.to(state.params.embedding.device) for x in batch(corpus, key, number, shape))
        with deterministic():
            params, opt_state, metrics = step(state.params, state.opt_state, tokens, mask)
        if not (metrics.loss.isfinite() and metrics.grad_norm.isfinite()):
            raise ValueError(f"step {number + 1}: the loss is {float(metrics.loss)} and the gradient's norm "
                             f"{float(metrics.grad_norm)}; the last snapshot is as it was: go on from it with a lower "
                             "learning rate or a longer warmup")
        state = TrainState(params, opt_state, state.step + 1)
        yield state, metrics


@contextmanager
def deterministic() -> Iterator[None]:
    """Torch's deterministic kernels: the same arguments give the same bits.

    Without them the embedding's gradient is added up by several threads in the order in which they happen to come.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for on CUDA
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
              torch.utils.deterministic.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, which costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


@torch.no_grad()
def evaluate(params: Params, corpus: Corpus, size: int = 32) -> float:
    """The mean loss over every token of a corpus, each in the context of its own row, `size` rows at a time."""
    device = params.embedding.device
    sums = [loss_sum(params, tokens.to(device), mask.to(device)) for tokens, mask in rows(corpus, size)]
    return float(sum(total for total, _ in sums) / sum(count for _, count in sums))
