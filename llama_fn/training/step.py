"""One step of training, a pure function of parameters, optimizer state and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_fn import tree
from llama_fn.model.block import block
from llama_fn.shapes import typed
from llama_fn.training.loss import loss_sum
from llama_fn.training.optim import Optimizer, apply_updates, global_norm


class Metrics(NamedTuple):
    """The mean loss over the tokens that count (nats), the gradient's norm before clipping, and their number."""

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    count: Int[Tensor, ""]


def make_step(optimizer: Optimizer, layer: Callable = block, *,
              loss_sum: Callable = loss_sum) -> Callable[..., tuple[Any, Any, Metrics]]:
    """The train step of an optimizer, ready for `jit(step, donate=("params", "opt_state"))`.

    ``loss_sum(params, *frozen, tokens, mask, layer=layer)`` returns a sum and the number of what it is summed over.
    ``params`` may be any tree, such as an adapter. `layer` is that of `forward`: with `remat(block)` the step takes
    less memory, and about a quarter more time.
    """

    @typed
    def step(params: Any, opt_state: Any, tokens: Int[Tensor, "a *b t"], mask: Bool[Tensor, "a *b t"],
             frozen: tuple = ()) -> tuple[Any, Any, Metrics]:
        """One update from `a` micro-batches, gone through one after another to save memory.

        Their gradients are those of *sums* of losses, divided at the end by the number of all tokens that count: the
        update is that of one large batch, however the tokens are spread over the micro-batches. ``frozen`` holds trees
        that the loss reads and that stay as they are, such as the model under an adapter. They are an argument because
        a compiled step would keep a copy of what it closes over.
        """
        total, count, grads = 0.0, 0, None
        for micro, counts in zip(tokens, mask, strict=True):
            def summed(params: Any) -> tuple[Tensor, Tensor]:
                return loss_sum(params, *frozen, micro, counts, layer=layer)  # noqa: B023, called at once

            new, (nats, number) = torch.func.grad_and_value(summed, has_aux=True)(params)
            total, count = total + nats, count + number
            grads = new if grads is None else tree.map(torch.add, grads, new)
        weight = count.clamp(min=1)
        grads = tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state, Metrics(total / weight, global_norm(grads), count)

    return step
