"""LoRA (Hu et al. 2021): W + alpha/r B A, where only the thin matrices A and B are trained. An adapter is its own tree.

So a gradient with respect to the adapter leaves the model as it is. `torch.vmap` over a stack of adapters trains many
of them in one step, or gives each row of a batch its own adapter.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama_fn import random, tree
from llama_fn.config import Config
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params
from llama_fn.ops.weight import is_divided, on_one_device
from llama_fn.random import Key
from llama_fn.ranges import integer, number
from llama_fn.shapes import typed
from llama_fn.transforms.adapter import LINEAR, Adapted, Lora, LowRank, Scale, adaptable, check_fit


@typed
def init(key: Key, params: Params, rank: int, targets: Sequence[str] = ("wq", "wv"), *,
         alpha: float | None = None, dtype: torch.dtype | None = None) -> Lora:
    """A new adapter, which changes nothing yet: A is uniform within 1/sqrt(inputs), as in PEFT, and B is zero.

    A target is the path of a weight, as "blocks.0.attention.wq", or the end of one: "wq" is the matrix in every layer.
    All matrices of the layers are ``lf.lora.LINEAR``. ``alpha`` None stands for ``rank``. ``dtype`` None stands for
    float32, or a wider dtype of the weights, so that small updates are not rounded away beside bfloat16 weights. Raises
    `ValueError` for a target that is not such a weight, and for numbers outside their range.

    >>> adapter = lf.lora.init(key, params, rank=8)
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
    """The parameters with the adapter beside its weights, which are not copied.

    `lf.forward` and all other functions take them. They compute what the parameters of `lf.lora.merge` do, up to
    rounding, in the dtype of the model. An adapter that is applied to the result is added to the first. Raises
    `ValueError` for an adapter that does not fit.

    >>> grads = torch.func.grad(lambda a: lf.loss(lf.lora.apply(params, a), tokens))(adapter)
    """
    def beside(path: str, _: Any, weight: Any) -> Any:
        if path not in adapter.matrices:
            return weight
        a, b = adapter.matrices[path]
        factor = _factor(adapter, b)
        return Adapted(weight, tree.map(lambda x: x.to(dtype), a), tree.map(lambda x: (x * factor).to(dtype), b))

    dtype = params.embedding.dtype
    places = {is_divided(x) for x in (params.norm, *(x for pair in adapter.matrices.values() for x in pair))}
    if len(places) > 1:  # the gradient of an adapter on every device would be that of the device's own rows
        raise ValueError("the parameters or the adapter are divided over devices, and the other is not; lf.mesh.shard "
                         "both by one plan")
    check_fit(params, adapter)
    return tree.map_with_path(beside, abstract_params(params.config), params)


@typed
def merge(params: Params, adapter: Lora) -> Params:
    """The parameters with W + alpha/r B A in the place of W: plain tensors, as fast as those of the model.

    Raises `ValueError` for an adapter that does not fit, and for a weight that is not a tensor.

    >>> merged = lf.lora.merge(params, adapter)
    """
    return _merged(params, adapter, 1)


@typed
def unmerge(params: Params, adapter: Lora) -> Params:
    """The inverse of `lf.lora.merge`, up to rounding; in bfloat16, better keep the parameters from before.

    Raises `ValueError` as `lf.lora.merge` does.

    >>> params = lf.lora.unmerge(lf.lora.merge(params, adapter), adapter)
    """
    return _merged(params, adapter, -1)


def stack(adapters: Sequence[Lora]) -> Lora:
    """Many adapters as one tree, whose leaves have a new first axis that `torch.vmap` can map.

    Raises `ValueError` for adapters that differ in weights, ranks or alpha.

    >>> both = lf.lora.stack([adapter, adapter])
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
    """The adapters of a stack, whose memory they share; the inverse of `lf.lora.stack`.

    Raises `ValueError` for an adapter that is not a stack.

    >>> first, second = lf.lora.unstack(lf.lora.stack([adapter, adapter]))
    """
    counts = {len(x) for x in tree.leaves(adapter)}
    if len(counts) != 1 or any(a.shape[1] != b.shape[-1] for a, b in adapter.matrices.values()):
        raise ValueError("lora.unstack: this is no stack of adapters, whose leaves have a first axis of one size, "
                         f"{'for it has no matrices' if not counts else 'before that of the rank'}")
    return [tree.map(lambda x: x[i], adapter) for i in range(counts.pop())]  # noqa: B023


def added(adapter: Lora, path: str, weight: Tensor, times: float = 1) -> Tensor:
    """A weight plus `times` alpha/r B A, computed in float32 at least, and cast back.

    A weight that the adapter does not have is returned as it is.
    """
    if path not in adapter.matrices:
        return weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = (x.to(dtype) for x in adapter.matrices[path])
    return (weight.to(dtype) + times * _factor(adapter, b) * torch.tensordot(b, a, 1)).to(weight.dtype)


def _targets(config: Config, targets: Sequence[str]) -> dict[str, Weight]:
    """The weights with these names, by their paths."""
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

    on_one_device("lora.merge", (params, adapter))
    check_fit(params, adapter)
    return tree.map_with_path(one, abstract_params(params.config), params)


def _factor(adapter: Lora, b: Tensor) -> float:
    return adapter.scale.alpha / b.shape[-1]
