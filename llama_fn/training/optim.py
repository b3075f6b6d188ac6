"""Optimizers as pure functions, with Optax's contract: `init(params) -> state` and
`update(grads, state, params) -> (updates, state)`, where `apply_updates` adds the updates to the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.ranges import number
from llama_fn.training.schedule import Schedule as Schedule  # said twice, a type checker takes it for public here
from llama_fn.training.schedule import warmup_cosine as warmup_cosine
from llama_fn.training.schedule import warmup_linear as warmup_linear


class Optimizer(NamedTuple):
    """Two pure functions (Optax's `GradientTransformation`)."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


class AdamState(NamedTuple):
    """Steps taken, and the running means of the gradients and of their squares, in float32 at least."""

    count: Tensor
    mu: Any
    nu: Any


def adamw(learning_rate: float | Tensor | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
          *, weight_decay: float | Tensor = 1e-4, mask: Any = None) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2; the decay is scaled by the learning rate, as in Optax and torch).

    `mask` says which leaves decay, by a tree of booleans or a function of the parameters to one; left out, all do.
    Raises `ValueError` for a number outside its range: b1 and b2 lie in [0, 1), the others in [0, inf).
    """
    return chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay, mask),
                 scale_by_learning_rate(learning_rate))


def sgd(learning_rate: float | Tensor | Schedule) -> Optimizer:
    """Plain gradient descent. Raises `ValueError` for a learning rate below 0 or not finite."""
    return scale_by_learning_rate(learning_rate)


def chain(*parts: Optimizer) -> Optimizer:
    """Each part's updates are the next one's gradients; the state is the tuple of their states."""

    def init(params: Any) -> tuple:
        return tuple(part.init(params) for part in parts)

    def update(grads: Any, state: tuple, params: Any = None) -> tuple[Any, tuple]:
        states = []
        for part, old in zip(parts, state, strict=True):
            grads, new = part.update(grads, old, params)
            states.append(new)
        return grads, tuple(states)

    return Optimizer(init, update)


def clip_by_global_norm(max_norm: float | Tensor) -> Optimizer:
    """Scale all gradients down together so that their common norm is `max_norm` at most (Pascanu et al. 2013).

    An infinite `max_norm` clips nothing. Raises `ValueError` for one that is not above 0.
    """
    max_norm = _number("clip_by_global_norm: max_norm", max_norm, above=True, below=False)

    def update(grads: Any, state: tuple, params: Any = None) -> tuple[Any, tuple]:
        norm = global_norm(grads)
        return tree.map(lambda g: torch.where(norm < max_norm, g, g / norm.to(g.dtype) * max_norm), grads), state

    return Optimizer(lambda params: (), update)


def scale_by_adam(b1: float, b2: float, eps: float) -> Optimizer:
    """Adam's direction (Kingma and Ba 2015): m / (sqrt(v) + eps), each corrected for its start at zero.

    Raises `ValueError` unless b1 and b2 lie in [0, 1) and eps in [0, inf).
    """
    b1, b2 = (_number(f"scale_by_adam: {name}", b, high=1.0, below=True) for name, b in (("b1", b1), ("b2", b2)))
    eps = _number("scale_by_adam: eps", eps)

    def init(params: Any) -> AdamState:
        zeros = [tree.map(lambda p: torch.zeros_like(p, dtype=_exact(p)), params) for _ in range(2)]
        return AdamState(_no_steps(params), *zeros)

    def update(grads: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        count = state.count + 1
        mu = tree.map(lambda m, g: b1 * m + (1 - b1) * g.to(m.dtype), state.mu, grads)
        nu = tree.map(lambda v, g: b2 * v + (1 - b2) * g.to(v.dtype).square(), state.nu, grads)

        def direction(m: Tensor, v: Tensor) -> Tensor:
            steps, tiny = count.to(m.dtype), torch.finfo(v.dtype).tiny
            # At v = 0 the root's slope is infinite; the clamp's is 0, which leaves the true derivative, dm / eps.
            return m / (1 - b1**steps) / ((v / (1 - b2**steps)).clamp(min=tiny).sqrt() + eps)

        return tree.map(direction, mu, nu), AdamState(count, mu, nu)

    return Optimizer(init, update)


def add_decayed_weights(weight_decay: float | Tensor, mask: Any = None) -> Optimizer:
    """Add `weight_decay` times each parameter (where `mask` is true) to its update.

    Raises `ValueError` for a decay below 0 or not finite.
    """
    weight_decay = _number("add_decayed_weights: weight_decay", weight_decay)

    def update(grads: Any, state: tuple, params: Any = None) -> tuple[Any, tuple]:
        decays = tree.map(lambda p: True, params) if mask is None else mask(params) if callable(mask) else mask

        def decayed(g: Tensor, p: Tensor, decay: bool) -> Tensor:
            return g + weight_decay * p.to(g.dtype) if decay else g

        return tree.map(decayed, grads, params, decays), state

    return Optimizer(lambda params: (), update)


def scale_by_learning_rate(learning_rate: float | Tensor | Schedule) -> Optimizer:
    """Multiply by minus the learning rate, of the number of steps taken before this one.

    Raises `ValueError` for a rate below 0 or not finite. (That of a schedule or a tensor is not read.)
    """
    if not callable(learning_rate):
        learning_rate = _number("scale_by_learning_rate: learning_rate", learning_rate)

    def init(params: Any) -> Tensor:
        return _no_steps(params)

    def update(grads: Any, count: Tensor, params: Any = None) -> tuple[Any, Tensor]:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return tree.map(lambda g: -rate * g, grads), count + 1

    return Optimizer(init, update)


def apply_updates(params: Any, updates: Any) -> Any:
    """Parameters plus updates, added in the updates' precision and kept in the parameters' dtype."""
    return tree.map(lambda p, u: (p + u).to(p.dtype), params, updates)


def global_norm(grads: Any) -> Tensor:
    """The Euclidean norm of all leaves together, in float32 at least."""
    return torch.stack([g.to(_exact(g)).square().sum() for g in tree.leaves(grads)]).sum().sqrt()


def matrices(params: Any) -> Any:
    """A mask for weight decay: every leaf of two axes or more, so no norm."""
    return tree.map(lambda p: p.ndim >= 2, params)


def _number(name: str, value: float | Tensor, **limits: Any) -> float | Tensor:
    """The number, in its range. A tensor is left as it is: it may be learned, and then it cannot be read."""
    return value if isinstance(value, Tensor) else number(name, value, **limits)


def _no_steps(params: Any) -> Tensor:
    """A count of zero, made from a parameter: mapped over many, `init` gives each a count in memory of its own."""
    if fixed := [path for path, x in tree.paths(params).items() if not x.is_floating_point()]:
        raise ValueError(f"{fixed[0]} holds integers, and they have no gradient (a quantized weight?): train an "
                         "adapter on top (lora.apply), or lf.dequantize(params)")
    return tree.leaves(params)[0].new_zeros((), dtype=torch.int64)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
