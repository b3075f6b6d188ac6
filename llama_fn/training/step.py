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

# step(params, opt_state, tokens, mask, segments, frozen); tokens, mask and segments are "a b t".
Step = Callable[..., tuple[Any, Any, "Metrics"]]
# update(params, opt_state, grads, total, count), of sums over as many tokens.
Update = Callable[[Any, Any, Any, Tensor, Tensor], tuple[Any, Any, "Metrics"]]
# gradient(params, frozen, tokens, mask) or gradient(params, frozen, tokens, mask, segments), each "b t": the gradients,
# the sum of the loss, and the number of tokens that count.
Gradient = Callable[..., tuple[Any, Tensor, Tensor]]


class Metrics(NamedTuple):
    """The mean loss over the tokens that count (nats), the gradient's norm before clipping, and their number."""

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    count: Int[Tensor, ""]  # pyright: ignore[reportIncompatibleMethodOverride]  nobody counts in a tuple of tensors


def make_step(optimizer: Optimizer, layer: Callable = block, *, loss_sum: Callable = loss_sum,
              compute_dtype: torch.dtype | None = None, update: Callable[[Optimizer], Update] | None = None) -> Step:
    """The train step of an optimizer, ready for `jit(step, donate=("params", "opt_state"))`.

    ``loss_sum(params, *frozen, tokens, mask, layer=layer)`` returns a sum and the number of what it is summed over, and
    ``params`` may be any tree, such as an adapter. `layer` is that of `forward`: with `remat(block)` the step takes
    less memory, and about a quarter more time. With `compute_dtype` the model computes in that dtype, and parameters,
    gradients and optimizer state keep theirs: float32 parameters are the master weights of a bfloat16 model. `loss_sum`
    may have options: `functools.partial(loss_sum, z_loss=1e-4)`. `update` makes the update of an optimizer, as
    `make_update` does.
    """
    def gradient(params: Any, frozen: tuple, *batch: Tensor) -> tuple[Any, Tensor, Tensor]:
        def summed(params: Any) -> tuple[Tensor, Tensor]:
            return loss_sum(in_dtype(params, compute_dtype), *frozen, *batch, layer=layer)

        grads, (nats, number) = torch.func.grad_and_value(summed, has_aux=True)(params)
        return grads, nats, number

    return accumulated(gradient, (update or make_update)(optimizer))


def accumulated(gradient: Gradient, update: Update) -> Step:
    """The step that adds up gradients over the micro-batches, and updates once."""
    @typed
    def step(params: Any, opt_state: Any, tokens: Int[Tensor, "a *b t"], mask: Bool[Tensor, "a *b t"],
             segments: Int[Tensor, "a *b t"] | None = None, frozen: tuple = ()) -> tuple[Any, Any, Metrics]:
        """One update from `a` micro-batches, gone through one after another to save memory.

        Their gradients are those of *sums* of losses, divided at the end by the number of all tokens that count: the
        update is that of one large batch, however the tokens are spread over the micro-batches. ``frozen`` holds trees
        that the loss reads and that stay as they are, such as the model under an adapter. They are an argument because
        a compiled step would keep a copy of what it closes over.
        """
        batch = (tokens, mask) if segments is None else (tokens, mask, segments)
        grads, total, count = gradient(params, frozen, *(x[0] for x in batch))
        for micro in zip(*(x[1:] for x in batch), strict=True):
            new, nats, number = gradient(params, frozen, *micro)
            grads, total, count = tree.map(torch.add, grads, new), total + nats, count + number
        return update(params, opt_state, grads, total, count)

    return step


def make_update(optimizer: Optimizer) -> Update:
    """`update(params, opt_state, grads, total, count)`, of sums over as many tokens."""
    def update(params: Any, opt_state: Any, grads: Any, total: Tensor, count: Tensor) -> tuple[Any, Any, Metrics]:
        weight = count.clamp(min=1)
        grads = tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state, Metrics(total / weight, global_norm(grads), count)

    return update


def in_dtype(params: Any, dtype: torch.dtype | None) -> Any:
    """The parameters in another dtype, but for those that are integers; None keeps them."""
    return params if dtype is None else tree.map(lambda x: x.to(dtype) if x.is_floating_point() else x, params)
