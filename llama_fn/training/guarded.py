"""A training step that leaves everything as it is where its loss or gradient is not finite."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.training.step import Metrics

P = ParamSpec("P")


def guarded(step: Callable[P, tuple[Any, Any, Metrics]]) -> Callable[P, tuple[Any, Any, Metrics]]:
    """The step, which gives back the parameters and the optimizer's state that it took if its loss is not finite.

    The same holds for a gradient's norm that is not finite. Otherwise the results are those of ``step``, bit for bit.
    The first two arguments of ``step`` are the parameters and the optimizer's state. An update, as `make_update` makes
    it, can be guarded as well. To compile a step, compile the
    guarded one: a compiled step that donates its memory has overwritten its arguments when it returns.

    Example: ``step = jit(guarded(make_step(optimizer)), donate=("params", "opt_state"))``.
    """

    @functools.wraps(step)
    def guarded_step(*args: P.args, **kwargs: P.kwargs) -> tuple[Any, Any, Metrics]:
        params, opt_state, metrics = step(*args, **kwargs)
        finite = is_finite(metrics)

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(finite, new, old)

        return tree.map(chosen, params, args[0]), tree.map(chosen, opt_state, args[1]), metrics

    return guarded_step


def is_finite(metrics: Metrics) -> Tensor:
    """Whether the loss and the gradient's norm are finite, as a tensor of one bool."""
    return metrics.loss.isfinite() & metrics.grad_norm.isfinite()
