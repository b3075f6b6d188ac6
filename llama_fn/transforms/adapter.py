"""What a LoRA adapter is: its tree, what stands in the place of an adapted weight, and which weights it fits."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llama_fn import tree
from llama_fn.config import Config
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.linear import linear
from llama_fn.model.transformer import Params
from llama_fn.ops.weight import Matrix, whole_shape

LINEAR = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")  # all matrices of a layer; PEFT's "all-linear"


class LowRank(NamedTuple):
    """The two thin matrices of one weight: A maps its inputs to r numbers, and B maps these to its outputs.

    >>> wq: lf.lora.LowRank = adapter.matrices["blocks.0.attention.wq"]
    """

    a: Float[Tensor, "r ..."]
    b: Float[Tensor, "... r"]


@tree.constant
@dataclass(frozen=True)
class Scale:
    """The numerator ``alpha`` of an adapter's factor alpha / r; a constant in a pytree, so it is not trained.

    >>> scale = lf.lora.Scale(alpha=16.0)
    """

    alpha: float


class Lora(NamedTuple):
    """An adapter: a dict of thin matrices by the paths of their weights, as ``blocks.0.attention.wq``, and its scale.

    >>> doubled: lf.lora.Lora = adapter._replace(scale=lf.lora.Scale(2 * adapter.scale.alpha))
    """

    matrices: dict[str, LowRank]
    scale: Scale


class Adapted(NamedTuple):
    """A value in a weight's place that stands for W + B A (Hu et al. 2021, eq. 3); the sum is not computed."""

    weight: Any  # a tensor, or another value in a weight's place
    a: Float[Matrix, "_ ..."]
    b: Float[Matrix, "... _"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W, if B A has it; else one with an axis of 0, so that the check of axes fails."""
        fits = self.b.shape[-1] == self.a.shape[0]
        fits = fits and (*self.b.shape[:-1], *self.a.shape[1:]) == tuple(self.weight.shape)
        return self.weight.shape if fits else (*self.b.shape, 0, *self.a.shape)

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of W with the parts that are on other devices."""
        return whole_shape(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self.weight.dtype

    def linear(self, x: Tensor, inputs: int) -> Tensor:
        """The linear map: W x + B (A x)."""
        return linear(self.weight, x, inputs) + linear(self.b, linear(self.a, x, inputs))


def adaptable(config: Config) -> dict[str, Weight]:
    """The matrices that an adapter may have, by their paths: all but the embedding."""
    return {path: weight for path, weight in tree.paths(abstract_params(config)).items()
            if len(weight.shape) > 1 and path != "embedding"}


def check_fit(params: Params, adapter: Lora) -> None:
    """Raise `ValueError` with all that is wrong if an adapter is not one of these parameters."""
    weights, wrong = adaptable(params.config), []
    for path, (a, b) in adapter.matrices.items():
        if path not in weights:
            wrong.append(f"{path}: the model has no such weight, or none that can be adapted")
            continue
        inner, outer = weights[path].inner, weights[path].outer
        of_a, of_b = whole_shape(a), whole_shape(b)
        if of_a[1:] != inner or of_b[:-1] != outer or of_a[0] != of_b[-1]:
            stacked = of_a[2:] == inner and of_b[1:-1] == outer
            wrong.append(f"{path}: A {list(of_a)} and B {list(of_b)} should be {_listed('r', *inner)} and "
                         f"{_listed(*outer, 'r')}" + "; `vmap` over a stack, or `unstack` it" * stacked)
    if wrong:
        raise ValueError("the adapter does not fit the parameters:\n  " + "\n  ".join(wrong))


def _listed(*axes: int | str) -> str:
    return f"[{', '.join(map(str, axes))}]"
