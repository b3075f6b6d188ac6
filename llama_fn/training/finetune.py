"""Fine-tuning as pure functions: what is trained, what stays as it is, and the loss of both."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.model.block import block
from llama_fn.model.transformer import Params
from llama_fn.training.dpo import dpo_loss_sum
from llama_fn.training.guarded import guarded
from llama_fn.training.loop import TrainState
from llama_fn.training.loss import ENTROPY, Entropy, loss_sum
from llama_fn.training.optim import Optimizer
from llama_fn.training.step import Metrics, make_step, make_update
from llama_fn.transforms import lora
from llama_fn.transforms.lora import Lora

Step = Callable[..., tuple[Any, Any, Metrics]]


class Task(NamedTuple):
    """What fine-tuning needs to know: its steps minimize ``loss_sum(trained, *frozen, tokens, mask)``.

    Like `loss_sum`, it takes ``layer`` and ``entropy``.
    """

    trained: Any
    """The tree that is trained, before the first step: parameters, an adapter, or a stack of adapters."""
    frozen: tuple
    """Trees that the loss reads and that stay as they are."""
    loss_sum: Callable[..., tuple[Tensor, Tensor]]
    finish: Callable[[Any], Any]
    """Turns the trained tree into the result: parameters in the dtypes of the model, or the adapter itself."""
    many: bool = False
    """Whether the trained tree is a stack of adapters, along the first axis of every leaf."""


def full(params: Params, beta: float | None = None) -> Task:
    """All parameters are trained, in float32 at least, so that small updates are not rounded away.

    The model computes in the dtypes of ``params``, and the result is cast back to them. With ``beta``, the loss is
    `dpo_loss`, whose reference is ``params``. Raises `ValueError` for quantized weights.
    """
    if fixed := [path for path, x in tree.paths(params).items() if not x.is_floating_point()]:
        raise ValueError(f"{fixed[0]} holds integers: quantized weights are not trained; train an adapter (--rank), or "
                         "the model that they were made of")

    def in_dtypes(trained: Params) -> Params:
        return tree.map(lambda x, dtype: x.to(dtype), trained, dtypes)

    def policy(trained: Params, *frozen: Params) -> Params:
        return in_dtypes(trained)

    dtypes = tree.map(lambda x: x.dtype, params)
    exact = tree.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), params)
    return Task(exact, () if beta is None else (params,), _loss_sum(policy, beta), in_dtypes)


def adapter(params: Params, start: Lora, beta: float | None = None, reference: Params | None = None) -> Task:
    """An adapter is trained on top of ``params``, which stay as they are and may be quantized.

    ``start`` is the adapter before the first step. With ``beta``, the loss is `dpo_loss` with this ``reference``; if
    it is None, ``params`` is the reference.
    """
    def policy(trained: Lora, base: Params, *frozen: Params) -> Params:
        return lora.apply(base, trained)

    frozen = (params,) if beta is None else (params, params if reference is None else reference)
    return Task(start, frozen, _loss_sum(policy, beta), lambda trained: trained)


def adapters(params: Params, starts: Lora, beta: float | None = None) -> Task:
    """Several adapters are trained in one step, as a stacked tree, each as if it were alone (see `adapter`).

    The batches have a first axis, too: entry i holds the rows of adapter i.
    """
    return adapter(params, starts, beta)._replace(many=True, finish=lora.unstack)


def begin(task: Task, optimizer: Optimizer) -> TrainState:
    """The state before the first step, with a copy of the tree that is trained."""
    trained = tree.map(torch.clone, task.trained)
    init = torch.vmap(optimizer.init) if task.many else optimizer.init
    return TrainState(trained, init(trained), torch.zeros((), dtype=torch.int64, device="cpu"))


def step_of(task: Task, optimizer: Optimizer, *, layer: Callable = block, make: Callable[..., Any] = make_step) -> Step:
    """The step ``(trained, opt_state, tokens, mask, frozen) -> (trained, opt_state, metrics)`` of a task.

    For several adapters, every argument but ``frozen`` has a first axis, and so have the results. ``make`` is
    `make_step`, or `jit_step` for a step that is compiled; several adapters are not compiled by it.
    """
    step = make(optimizer, layer, loss_sum=task.loss_sum, update=lambda optimizer: guarded(make_update(optimizer)))

    def taken(params: Any, opt_state: Any, tokens: Tensor, mask: Tensor,
              frozen: tuple = ()) -> tuple[Any, Any, Metrics]:
        return step(params, opt_state, tokens, mask, None, frozen)

    def mapped(params: Any, opt_state: Any, tokens: Tensor, mask: Tensor,
               frozen: tuple = ()) -> tuple[Any, Any, Metrics]:
        return torch.vmap(taken, (0, 0, 0, 0, None))(params, opt_state, tokens, mask, frozen)

    return mapped if task.many else taken


@torch.no_grad()
def evaluate(task: Task, trained: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """The mean loss over batches, as a list: one number for each adapter, or one in all."""
    def summed(trained: Any, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return task.loss_sum(trained, *task.frozen, tokens, mask)

    f = torch.vmap(summed) if task.many else summed
    totals, counts = zip(*(f(trained, tokens, mask) for tokens, mask in batches), strict=True)
    mean = torch.stack(totals).sum(0) / torch.stack(counts).sum(0).clamp(min=1)
    return mean.reshape(-1).tolist()


def _loss_sum(policy: Callable[..., Params], beta: float | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The loss of the model ``policy(trained, *frozen)``; with ``beta``, DPO's, whose reference is ``frozen[-1]``."""
    def summed(trained: Any, *rest: Any, layer: Callable = block,
               entropy: Entropy = ENTROPY) -> tuple[Tensor, Tensor]:
        *frozen, tokens, mask = rest
        params = policy(trained, *frozen)
        if beta is None:
            return loss_sum(params, tokens, mask, layer=layer, entropy=entropy)
        return dpo_loss_sum(params, frozen[-1], tokens, mask, beta=beta, layer=layer, entropy=entropy)

    return summed
