"""One step of training, a pure function of parameters, optimizer state and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_fn import tree
from llama_fn.model.block import block
from llama_fn.model.transformer import Params
from llama_fn.shapes import typed
from llama_fn.training.loss import loss_sum
from llama_fn.training.optim import Optimizer, apply_updates, global_norm


class Metrics(NamedTuple):
    """The mean loss over the tokens that count (nats), the gradient's norm before clipping, and their number."""

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    count: Int[Tensor, ""]


def make_step(optimizer: Optimizer, layer: Callable = block) -> Callable[..., tuple[Params, Any, Metrics]]:
    """The train step of an optimizer, ready for `jit(step, donate=("params", "opt_state"))`.

    `layer` is that of `forward`: with `remat(block)` the step takes less memory, and about a quarter more time.
    """

    @typed
    def step(params: Params, opt_state: Any, tokens: Int[Tensor, "a b t"],
             mask: Bool[Tensor, "a b t"],
             segments: Int[Tensor, "a b t"] | None = None) -> tuple[Params, Any, Metrics]:
        """One update from `a` micro-batches, gone through one after another to save memory.

        Their gradients are those of *sums* of losses, divided at the end by the number of all tokens that count: the
        update is that of one large batch, however the tokens are spread over the micro-batches.
        """
        total, count, grads = 0.0, 0, None
        each = [None] * len(tokens) if segments is None else segments
        for micro, counts, within in zip(tokens, mask, each, strict=True):
            def summed(params: Params) -> tuple[Tensor, Tensor]:
                return loss_sum(params, micro, counts, within, layer=layer)  # noqa: B023, called at once

            new, (nats, number) = torch.func.grad_and_value(summed, has_aux=True)(params)
            total, count = total + nats, count + number
            grads = new if grads is None else tree.map(torch.add, grads, new)
        weight = count.clamp(min=1)
        grads = tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state, Metrics(total / weight, global_norm(grads), count)

    return step
