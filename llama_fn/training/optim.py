"""Optimizers as pure functions, chained of the parts in `optim_parts.py`; learning rates are in `schedule.py`.

An optimizer has Optax's contract: `init(params) -> state` and `update(grads, state, params) -> (updates, state)`, where
`apply_updates` adds the updates to the parameters.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from llama_fn.training.muon import outputs, scale_by_muon
from llama_fn.training.optim_parts import (
    AdamState,
    Optimizer,
    add_decayed_weights,
    apply_updates,
    chain,
    clip_by_global_norm,
    global_norm,
    matrices,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_lion,
)
from llama_fn.training.schedule import Schedule, warmup_cosine, warmup_linear, warmup_stable_decay

__all__ = ["AdamState", "Optimizer", "adamw", "add_decayed_weights", "apply_updates", "chain", "clip_by_global_norm",
           "global_norm", "lion", "matrices", "muon", "outputs", "scale_by_adam", "scale_by_learning_rate",
           "scale_by_lion", "scale_by_muon", "sgd", "warmup_cosine", "warmup_linear", "warmup_stable_decay"]


def adamw(learning_rate: float | Tensor | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
          *, weight_decay: float | Tensor = 1e-4, mask: Any = None) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2; the decay is scaled by the learning rate, as in Optax and torch).

    `mask` says which leaves decay, by a tree of booleans or a function of the parameters to one; left out, all do.
    Raises `ValueError` for a number outside its range: b1 and b2 lie in [0, 1), the others in [0, inf).

    >>> optimizer = lf.optim.adamw(3e-4, weight_decay=0.1, mask=lf.optim.matrices)
    """
    return chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay, mask),
                 scale_by_learning_rate(learning_rate))


def lion(learning_rate: float | Tensor | Schedule, b1: float = 0.9, b2: float = 0.99,
         *, weight_decay: float | Tensor = 1e-3, mask: Any = None) -> Optimizer:
    """Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2; Optax's `lion`).

    Its learning rate is 3 to 10 times smaller than AdamW's, and its decay as much larger. `mask` is that of `adamw`.
    Raises `ValueError` for a number outside its range: b1 and b2 lie in [0, 1), the others in [0, inf).

    >>> optimizer = lf.optim.lion(1e-4, weight_decay=0.1)
    """
    return chain(scale_by_lion(b1, b2), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


def muon(learning_rate: float | Tensor | Schedule, momentum: float = 0.95, b1: float = 0.9, b2: float = 0.95,
         eps: float = 1e-8, *, weight_decay: float | Tensor = 0.1, mask: Any = None,
         outputs: Callable[[Any], Any] = outputs) -> Optimizer:
    """Muon for hidden matrices, and AdamW for all other leaves: embedding, output head and norms.

    (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is scalable
    for LLM training", eq. 4: scaled by 0.2 sqrt(max(rows, columns)), a matrix moves as far as AdamW would move it, and
    one learning rate serves both.) `outputs` says which leaves are hidden matrices, see there. `mask` is that of
    `adamw`.

    Raises `ValueError` for a number outside its range: momentum, b1 and b2 lie in [0, 1), the others in [0, inf).

    >>> optimizer = lf.optim.muon(0.02)
    """
    return chain(scale_by_muon(momentum, b1, b2, eps, outputs=outputs), add_decayed_weights(weight_decay, mask),
                 scale_by_learning_rate(learning_rate))


def sgd(learning_rate: float | Tensor | Schedule) -> Optimizer:
    """Plain gradient descent. Raises `ValueError` for a learning rate below 0 or not finite.

    >>> optimizer = lf.optim.sgd(0.1)
    """
    return scale_by_learning_rate(learning_rate)
