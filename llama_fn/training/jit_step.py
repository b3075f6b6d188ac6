"""`jit_step`: the train step, compiled by its parts."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.compiled.compiler import obstacle, uncompiled
from llama_fn.compiled.differentiable import differentiable
from llama_fn.compiled.layers import by_shape
from llama_fn.compiled.leafwise import leafwise
from llama_fn.model.block import block
from llama_fn.private_inductor import lacking
from llama_fn.training.loss import ENTROPY, Entropy, loss_sum
from llama_fn.training.optim import Optimizer
from llama_fn.training.step import Step, Update, accumulated, in_dtype, make_step, make_update


def jit_step(optimizer: Optimizer, layer: Callable = block, *, loss_sum: Callable = loss_sum,
             compute_dtype: torch.dtype | None = None,
             update: Callable[[Optimizer], Update] = make_update) -> Step:
    """`make_step`, compiled: the same signature and, up to rounding, the same results.

    All layers share one compiled block, forward and backward, all chunks of the loss one more, and all leaves of the
    optimizer a loop, so that the first step takes as long for 80 layers as for one. Layers that need no gradient, such
    as those of a frozen reference, share a compiled forward. Parameters and optimizer state are donated: the new ones
    take their memory. Where nothing can be compiled, a warning says why, and the step runs as it is.
    """
    if (reason := obstacle() or lacking()) is not None:
        warnings.warn(uncompiled("a training step", reason), stacklevel=2)
        return make_step(optimizer, layer, loss_sum=loss_sum, compute_dtype=compute_dtype, update=update)
    layer, *parts = (differentiable(by_shape(f)) for f in (layer, *ENTROPY))
    entropy = Entropy(*parts)

    def gradient(params: Any, frozen: tuple, *batch: Tensor) -> tuple[Any, Tensor, Tensor]:
        with torch.enable_grad():
            own = tree.map(lambda x: x.detach().requires_grad_(), params)
            nats, number = loss_sum(in_dtype(own, compute_dtype), *frozen, *batch, layer=layer, entropy=entropy)
        grads = iter(torch.autograd.grad(nats, tree.leaves(own)))
        return tree.map(lambda _: next(grads), params), nats.detach(), number

    return accumulated(gradient, leafwise(update(optimizer), donate=("params", "opt_state")))
