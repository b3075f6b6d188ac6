"""Muon's direction: the momentum of a hidden matrix, with all its singular values moved close to one."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from llama_fn import tree
from llama_fn.mesh.shard import shard_leaf, unshard
from llama_fn.mesh.sharded import is_sharded
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params
from llama_fn.ranges import number
from llama_fn.shapes import typed
from llama_fn.training.optim_parts import Optimizer, no_steps, scale_by_adam, zeros

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024: the steepest start that stays within [0.7, 1.2]
STEPS = 5
TINY = 1e-14  # the least square of a norm that is divided by


def outputs(params: Any) -> Any:
    """How many of each leaf's first axes are the outputs of a hidden matrix; 0 for a leaf that is none.

    Of `lf.Params`, all matrices of the layers are: their heads are flattened, "k g h d" to "(k g h) d", and ``wo`` to
    "d (k g h)". Of any other tree, all leaves of two axes or more are, and the last axis is their inputs.

    >>> columns = lf.optim.outputs(params)
    """
    def of_layer(path: str, weight: Weight) -> int:
        return len(weight.outer) if path.startswith("blocks.") and len(weight.shape) > 1 else 0

    if isinstance(params, Params):
        return tree.map_with_path(of_layer, abstract_params(params.config))
    return tree.map(lambda x: max(len(x.shape) - 1, 0), params, is_leaf=is_sharded)


class MuonState(NamedTuple):
    """The momentum of each hidden matrix by its path, and Adam's state of all other leaves, by theirs."""

    momentum: dict[str, Any]
    adam: Any


def scale_by_muon(momentum: float, b1: float, b2: float, eps: float,
                  *, outputs: Callable[[Any], Any] = outputs) -> Optimizer:
    """Nesterov's momentum of hidden matrices, made orthogonal and scaled by 0.2 sqrt(max(rows, columns)).

    All other leaves get Adam's direction. Raises `ValueError` for a number outside its range,
    [0, 1) for momentum, b1 and b2.

    >>> muon = lf.optim.scale_by_muon(0.95, 0.9, 0.95, 1e-8)
    """
    momentum = number("scale_by_muon: momentum", momentum, high=1.0, below=True)
    adam = scale_by_adam(b1, b2, eps)

    def apart(axes: dict[str, int], values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        leaves = tree.paths(values, is_sharded)
        return ({path: x for path, x in leaves.items() if axes[path]},
                {path: x for path, x in leaves.items() if not axes[path]})

    def axes_of(values: Any) -> dict[str, int]:
        return {path: x.local if is_sharded(x) else x for path, x in tree.paths(outputs(values), is_sharded).items()}

    def init(params: Any) -> MuonState:
        no_steps(params)  # raises for integers
        matrices, others = apart(axes_of(params), params)
        return MuonState(zeros(matrices), adam.init(others) if others else ())

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        axes = axes_of(grads)
        matrices, others = apart(axes, grads)
        means = tree.map(lambda m, g: momentum * m + g.to(m.dtype), state.momentum, matrices)
        ahead = tree.map(lambda m, g: g.to(m.dtype) + momentum * m, means, matrices)

        def direction(path: str, part: Any) -> Any:
            whole = unshard(part)  # the singular vectors are those of the whole matrix
            x = whole.flatten(0, axes[path] - 1).flatten(1)
            x = (0.2 * math.sqrt(max(x.shape)) * orthogonalized(x)).reshape(whole.shape)
            return shard_leaf(x, part.sharding) if is_sharded(part) else x

        rest, adam_state = adam.update(others, state.adam) if others else ({}, ())
        found = rest | {path: direction(path, part) for path, part in ahead.items()}
        return tree.map_with_path(lambda path, _: found[path], grads, is_leaf=is_sharded), MuonState(means, adam_state)

    return Optimizer(init, update)


@typed
def orthogonalized(x: Float[Tensor, "o d"]) -> Float[Tensor, "o d"]:
    """The singular vectors of x with singular values near 1, by `STEPS` steps of a Newton-Schulz iteration.

    Each step maps every singular value s to a s + b s^3 + c s^5.
    """
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    wide = wide / wide.square().sum().clamp(min=TINY).sqrt()  # clamped, x = 0 has a derivative, too
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.mT
