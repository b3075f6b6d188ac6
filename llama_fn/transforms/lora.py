"""LoRA (Hu et al. 2021): W + alpha/r B A, where only the thin A and B are trained. An adapter is a tree of its own.

So the gradient with respect to it leaves the model frozen, and `vmap` over a stack of adapters trains many in one step,
or serves each row of a batch with its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llama_fn import random, tree
from llama_fn.config import Config
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.linear import linear
from llama_fn.model.transformer import Params
from llama_fn.ops.weight import Matrix
from llama_fn.random import Key
from llama_fn.ranges import integer, number
from llama_fn.shapes import typed

LINEAR = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")  # all matrices of the layers; PEFT's "all-linear"


class LowRank(NamedTuple):
    """A: from the axes that go into the weight to r. B: from r to those that come out of it."""

    a: Float[Tensor, "r ..."]
    b: Float[Tensor, "... r"]


@tree.constant
@dataclass(frozen=True)
class Scale:
    """An adapter of rank r counts alpha / r times. A constant: part of the tree's structure, and not trained."""

    alpha: float


class Lora(NamedTuple):
    """An adapter: thin matrices by the paths of the weights that they stand beside, as in `blocks.0.attention.wq`."""

    matrices: dict[str, LowRank]
    scale: Scale


class Adapted(NamedTuple):
    """W + B A, where B and A are thin: x goes through W and, beside it, through A, then B (Hu et al. 2021, eq. 3)."""

    weight: Any  # a weight of any kind
    a: Float[Matrix, "_ ..."]
    b: Float[Matrix, "... _"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of W, if B A has it. If not, B's, 0 and A's: no weight has an axis of 0, so the check of axes tells."""
        fits = self.b.shape[-1] == self.a.shape[0]
        fits = fits and (*self.b.shape[:-1], *self.a.shape[1:]) == tuple(self.weight.shape)
        return self.weight.shape if fits else (*self.b.shape, 0, *self.a.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def linear(self, x: Tensor, inputs: int) -> Tensor:
        """W x + B (A x)."""
        return linear(self.weight, x, inputs) + linear(self.b, linear(self.a, x, inputs))


@typed
def init(key: Key, params: Params, rank: int, targets: Sequence[str] = ("wq", "wv"), *,
         alpha: float | None = None, dtype: torch.dtype | None = None) -> Lora:
    """An adapter that changes nothing yet: A uniform within 1/sqrt(inputs), as in PEFT, and B zero.

    A target is a weight's path or the end of one: "wq" is in every layer, "blocks.0.attention.wq" in the first, and
    `LINEAR` are all matrices of the layers. `alpha` None is `rank`. `dtype` None is float32 at least: beside bfloat16
    weights, too, small updates count. Raises `ValueError` for a target that is no such weight.
    """
    found = _targets(params.config, targets)
    rank = integer("lora.init: rank", rank, 1)
    alpha = number("lora.init: alpha", rank if alpha is None else alpha, above=True)
    device, dtype = params.embedding.device, dtype or torch.promote_types(params.embedding.dtype, torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"lora.init: an adapter is trained, so its dtype must be a floating one, got {dtype}")
    matrices = {}
    for each, (path, weight) in zip(random.split(key, len(found)), found.items(), strict=True):
        bound = 1 / math.sqrt(math.prod(weight.inner))
        a = random.uniform(each, (rank, *weight.inner), minval=-bound, maxval=bound).to(device, dtype)
        matrices[path] = LowRank(a, a.new_zeros((*weight.outer, rank)))
    return Lora(matrices, Scale(alpha))


@typed
def apply(params: Params, adapter: Lora) -> Params:
    """The parameters with the adapter beside its weights, which are not copied: `forward` and all else takes them.

    They compute what `merge` does, up to rounding, in the dtype of the model. An adapter applied to the result adds up.
    Raises `ValueError` for an adapter that does not fit.
    """
    def beside(path: str, _: Any, weight: Any) -> Any:
        if path not in adapter.matrices:
            return weight
        a, b = adapter.matrices[path]
        return Adapted(weight, a.to(dtype), (b * _share(adapter, b)).to(dtype))

    dtype = params.embedding.dtype
    check_fit(params, adapter)
    return tree.map_with_path(beside, abstract_params(params.config), params)


@typed
def merge(params: Params, adapter: Lora) -> Params:
    """The parameters with W + alpha/r B A in the place of W: as fast as without, and a model like any other to save.

    Raises `ValueError` for an adapter that does not fit, and for a weight that has one applied.
    """
    return _merged(params, adapter, 1)


@typed
def unmerge(params: Params, adapter: Lora) -> Params:
    """The inverse of `merge`, up to rounding: in bfloat16, better keep the parameters from before."""
    return _merged(params, adapter, -1)


def stack(adapters: Sequence[Lora]) -> Lora:
    """Adapters as one, whose leaves have a first axis to `vmap` over: `vmap(f, (None, 0))(params, stack(adapters))`.

    Raises `ValueError` for adapters that differ in weights, ranks or alpha.
    """
    if not adapters:
        raise ValueError("lora.stack: there are no adapters")
    facts = [({path: (a.shape, b.shape) for path, (a, b) in adapter.matrices.items()}, adapter.scale)
             for adapter in adapters]
    for i, (shapes, scale) in enumerate(facts):
        if (shapes, scale) != facts[0]:
            wrong = next((path for path in shapes | facts[0][0] if shapes.get(path) != facts[0][0].get(path)), scale)
            raise ValueError(f"lora.stack: adapters 0 and {i} differ in {wrong}; stack those of one kind")
    return tree.map(lambda *leaves: torch.stack(leaves), *adapters)


def unstack(adapter: Lora) -> list[Lora]:
    """The inverse of `stack`; the adapters share its memory. Raises `ValueError` for what is no stack."""
    counts = {len(x) for x in tree.leaves(adapter)}
    if len(counts) != 1 or any(a.shape[1] != b.shape[-1] for a, b in adapter.matrices.values()):
        raise ValueError("lora.unstack: this is no stack of adapters, whose leaves have a first axis of one size, "
                         f"{'for it has no matrices' if not counts else 'before that of the rank'}")
    return [tree.map(lambda x: x[i], adapter) for i in range(counts.pop())]  # noqa: B023


def added(adapter: Lora, path: str, weight: Tensor, times: float = 1) -> Tensor:
    """The weight of a path plus `times` its share of the adapter, computed in float32 at least, and cast back."""
    if path not in adapter.matrices:
        return weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    a, b = (x.to(exact) for x in adapter.matrices[path])
    return (weight.to(exact) + times * _share(adapter, b) * torch.tensordot(b, a, 1)).to(weight.dtype)


def adaptable(config: Config) -> dict[str, Weight]:
    """The matrices that an adapter may stand beside: all but the embedding."""
    return {path: weight for path, weight in tree.paths(abstract_params(config)).items()
            if len(weight.shape) > 1 and path != "embedding"}


def check_fit(params: Params, adapter: Lora) -> None:
    """Raise `ValueError` for an adapter of other weights than these, with all that is wrong."""
    weights, wrong = adaptable(params.config), []
    for path, (a, b) in adapter.matrices.items():
        if path not in weights:
            wrong.append(f"{path}: the model has no such weight, or none that can be adapted")
            continue
        inner, outer = weights[path].inner, weights[path].outer
        if a.shape[1:] != inner or b.shape[:-1] != outer or a.shape[0] != b.shape[-1]:
            stacked = a.shape[2:] == inner and b.shape[1:-1] == outer
            wrong.append(f"{path}: A {list(a.shape)} and B {list(b.shape)} should be {_listed('r', *inner)} and "
                         f"{_listed(*outer, 'r')}" + "; `vmap` over a stack, or `unstack` it" * stacked)
    if wrong:
        raise ValueError("the adapter does not fit the parameters:\n  " + "\n  ".join(wrong))


def _targets(config: Config, targets: Sequence[str]) -> dict[str, Weight]:
    """The weights with these names."""
    able = adaptable(config)
    if isinstance(targets, str) or not targets:
        raise ValueError(f"lora.init: targets is a list of names of weights, got {targets!r}")
    for target in targets:
        if not any(_is_end(target, path) for path in able):
            raise ValueError(f"lora.init: {target!r} is no weight that can be adapted; those are "
                             f"{', '.join(LINEAR)}, output, or one alone, as in {next(iter(able))!r}")
    return {path: weight for path, weight in able.items() if any(_is_end(target, path) for target in targets)}


def _is_end(target: str, path: str) -> bool:
    return f".{path}".endswith(f".{target}")


def _merged(params: Params, adapter: Lora, times: float) -> Params:
    def one(path: str, _: Any, weight: Any) -> Any:
        if path in adapter.matrices and not isinstance(weight, Tensor):
            raise ValueError(f"{path} is no tensor but {type(weight).__name__}: merge into the parameters from before")
        return added(adapter, path, weight, times)

    check_fit(params, adapter)
    return tree.map_with_path(one, abstract_params(params.config), params)


def _share(adapter: Lora, b: Tensor) -> float:
    return adapter.scale.alpha / b.shape[-1]


def _listed(*axes: int | str) -> str:
    return f"[{', '.join(map(str, axes))}]"
