"""The parts that optimizers are chained of: pure functions with Optax's contract.

`init(params) -> state` and `update(grads, state, params) -> (updates, state)`; `apply_updates` adds the updates to the
parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.mesh.sharded import squared_norm
from llama_fn.ranges import number
from llama_fn.training.schedule import Schedule


class Optimizer(NamedTuple):
    """Two pure functions (Optax's ``GradientTransformation``).

    >>> state = optimizer.init(params)
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


class AdamState(NamedTuple):
    """Steps taken, and the running means of the gradients and of their squares, in float32 at least.

    >>> lf.optim.scale_by_adam(0.9, 0.95, 1e-8).init(params).count
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  Optax's name
    mu: Any
    nu: Any


def chain(*parts: Optimizer) -> Optimizer:
    """Each part's updates are the next one's gradients; the state is the tuple of their states.

    >>> optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0), lf.optim.adamw(3e-4))
    """

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

    >>> clip = lf.optim.clip_by_global_norm(1.0)
    """
    max_norm = _number("clip_by_global_norm: max_norm", max_norm, above=True, below=False)

    def update(grads: Any, state: tuple, params: Any = None) -> tuple[Any, tuple]:
        norm = global_norm(grads)
        return tree.map(lambda g: torch.where(norm < max_norm, g, g / norm.to(g.dtype) * max_norm), grads), state

    return Optimizer(lambda params: (), update)


def scale_by_adam(b1: float, b2: float, eps: float) -> Optimizer:
    """Adam's direction (Kingma and Ba 2015): m / (sqrt(v) + eps), each corrected for its start at zero.

    Raises `ValueError` unless b1 and b2 lie in [0, 1) and eps in [0, inf).

    >>> adam = lf.optim.scale_by_adam(0.9, 0.95, 1e-8)
    """
    b1, b2 = _decays("scale_by_adam", b1, b2)
    eps = _number("scale_by_adam: eps", eps)

    def init(params: Any) -> AdamState:
        return AdamState(no_steps(params), zeros(params), zeros(params))

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


def scale_by_lion(b1: float, b2: float) -> Optimizer:
    """Lion's direction: the signs of b1 m + (1 - b1) g, where m is the running mean of the gradients g by b2.

    Raises `ValueError` unless b1 and b2 lie in [0, 1).

    >>> lion = lf.optim.scale_by_lion(0.9, 0.99)
    """
    b1, b2 = _decays("scale_by_lion", b1, b2)

    def init(params: Any) -> Any:
        no_steps(params)  # raises for integers
        return zeros(params)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        signs = tree.map(lambda m, g: torch.sign(b1 * m + (1 - b1) * g.to(m.dtype)), state, grads)
        return signs, tree.map(lambda m, g: b2 * m + (1 - b2) * g.to(m.dtype), state, grads)

    return Optimizer(init, update)


def add_decayed_weights(weight_decay: float | Tensor, mask: Any = None) -> Optimizer:
    """Add `weight_decay` times each parameter (where `mask` is true) to its update.

    Raises `ValueError` for a decay below 0 or not finite.

    >>> decay = lf.optim.add_decayed_weights(0.1, lf.optim.matrices)
    """
    weight_decay = _number("add_decayed_weights: weight_decay", weight_decay)

    def update(grads: Any, state: tuple, params: Any = None) -> tuple[Any, tuple]:
        decays = tree.map(lambda p: True, params) if mask is None else mask(params) if callable(mask) else mask

        def decayed(decay: bool, grads: Any, params: Any) -> Any:  # a weight's parts are a tree, and its mask a leaf
            return tree.map(lambda g, p: g + weight_decay * p.to(g.dtype), grads, params) if decay else grads

        return tree.map(decayed, decays, grads, params), state

    return Optimizer(lambda params: (), update)


def scale_by_learning_rate(learning_rate: float | Tensor | Schedule) -> Optimizer:
    """Multiply by minus the learning rate, of the number of steps taken before this one.

    Raises `ValueError` for a rate below 0 or not finite. (That of a schedule or a tensor is not read.)

    >>> scale = lf.optim.scale_by_learning_rate(3e-4)
    """
    if not callable(learning_rate):
        learning_rate = _number("scale_by_learning_rate: learning_rate", learning_rate)

    def init(params: Any) -> Tensor:
        return no_steps(params)

    def update(grads: Any, count: Tensor, params: Any = None) -> tuple[Any, Tensor]:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return tree.map(lambda g: -rate * g, grads), count + 1

    return Optimizer(init, update)


def apply_updates(params: Any, updates: Any) -> Any:
    """Parameters plus updates, added in the updates' precision and kept in the parameters' dtype.

    >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    >>> params = lf.optim.apply_updates(params, updates)
    """
    return tree.map(lambda p, u: (p + u).to(p.dtype), params, updates)


def global_norm(grads: Any) -> Tensor:
    """The Euclidean norm of all leaves together, in float32 at least.

    >>> norm = lf.optim.global_norm(grads)
    """
    return squared_norm(grads).sqrt()


def matrices(params: Any) -> Any:
    """A mask for weight decay: every leaf of two axes or more, so no norm.

    >>> mask = lf.optim.matrices(params)
    """
    return tree.map(lambda p: p.ndim >= 2, params)


def zeros(params: Any) -> Any:
    """A zero for each parameter, in float32 at least: a running mean before the first step."""
    return tree.map(lambda p: torch.zeros_like(p, dtype=_exact(p)), params)


def no_steps(params: Any) -> Tensor:
    """A count of zero, made from a parameter: mapped over many, `init` gives each a count in memory of its own.

    Raises `ValueError` for parameters that are integers.
    """
    if fixed := [path for path, x in tree.paths(params).items() if not x.is_floating_point()]:
        raise ValueError(f"{fixed[0]} holds integers, and they have no gradient (a quantized weight?): train an "
                         "adapter on top (lora.apply), or lf.dequantize(params)")
    return tree.leaves(params)[0].new_zeros((), dtype=torch.int64)


def _number(name: str, value: float | Tensor, **limits: Any) -> Any:
    """The number, in its range. A tensor is left as it is: it may be learned, and then it cannot be read."""
    return value if isinstance(value, Tensor) else number(name, value, **limits)


def _decays(name: str, b1: float, b2: float) -> tuple[float, float]:
    """The decays of two running means, in [0, 1)."""
    return _number(f"{name}: b1", b1, high=1.0, below=True), _number(f"{name}: b2", b2, high=1.0, below=True)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
