"""How one leaf is divided: the part of it that a device has, and the whole of all parts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llama_fn import tree
from llama_fn.mesh.collectives import MeshAxis, gathered, sliced
from llama_fn.model.init import Weight
from llama_fn.ops.quantized import GROUP, Grouped, Quantized

LOCAL = ("k", "f")  # the axes that stay divided from one matrix to the next
VOCABULARY = "v"  # divided within the embedding and the head; tokens and logits are whole


@tree.constant
@dataclass(frozen=True)
class Sharding:
    """How one leaf is divided: its axes' names, the mesh axis that divides each or None, and those that divide rows.

    >>> axes = params.blocks[0].attention.wq.sharding.axes
    """

    axes: tuple[str, ...]
    over: tuple[MeshAxis | None, ...]
    batch: tuple[MeshAxis, ...]

    def is_local(self, i: int) -> bool:
        """Whether devices compute with their own part of axis i alone."""
        return self.over[i] is not None and self.axes[i] in (*LOCAL, VOCABULARY) and self.over[i] not in self.batch

    def local(self, axes: Sequence[int]) -> list[MeshAxis]:
        """The mesh axes over which devices compute with their own part of one of these axes."""
        return [axis for i, axis in enumerate(self.over) if axis is not None and i in axes and self.is_local(i)]


def cut(whole: Any, sharding: Sharding) -> Any:
    """The device's own part of a leaf; an axis that `vmap` maps may come first."""
    return _each_tensor(sliced, whole, sharding.over)


def joined(part: Any, sharding: Sharding) -> Any:
    """The whole of a leaf from the parts of all devices, on each of them; an axis that `vmap` mapped may come first."""
    return tree.map(lambda x: x.contiguous(), _each_tensor(gathered, part, sharding.over))


def check_leaf(path: str, weight: Weight, x: Any, sharding: Sharding) -> None:
    """Raise `ValueError` unless x is a tensor or a quantized weight that can be divided so.

    A quantized weight is never gathered: each device computes with its own integers (tensor parallelism).
    """
    if not isinstance(x, Tensor | Quantized | Grouped):
        raise ValueError(f"shard: {path} is no tensor but {type(x).__name__}; shard plain parameters (see "
                         "lf.mesh.unshard), and an adapter by itself")
    if tuple(x.shape) != weight.shape:
        raise ValueError(f"shard: {path} is {list(x.shape)}, and the config says {list(weight.shape)}")
    if not isinstance(x, Tensor):
        _check_quantized(path, len(weight.outer), x, sharding)


def _check_quantized(path: str, outer: int, x: Quantized | Grouped, sharding: Sharding) -> None:
    for i, axis in enumerate(sharding.over):
        if axis is None:
            continue
        if not sharding.is_local(i):
            raise ValueError(f"shard: {path} is quantized, and {sharding.axes[i]} is divided over {axis.name}, so that "
                             "it would be gathered where it is used; choose the plan replicated, tensor or "
                             "replicated+tensor")
        inputs = math.prod(x.shape[outer:]) // axis.size
        if isinstance(x, Grouped) and i >= outer and inputs % GROUP:
            raise ValueError(f"shard: {path} has {inputs} inputs on each of {axis.size} devices, and in four bits "
                             f"{GROUP} inputs share a scale; choose fewer devices, or int8")


def _each_tensor(move: Callable[[Tensor, int, MeshAxis], Tensor], x: Any, over: Sequence[MeshAxis | None]) -> Any:
    """Move the parts of each tensor of a leaf along each axis that is divided."""
    def one(x: Tensor, over: Sequence[MeshAxis | None]) -> Tensor:
        for i, axis in enumerate(over):
            if axis is not None:
                x = move(x, i - len(over), axis)
        return x

    if isinstance(x, Quantized):
        return Quantized(one(x.values, over), one(x.scale, over[:x.scale.ndim]))
    if isinstance(x, Grouped):  # the inputs' groups are one axis, which the first axis of the inputs divides
        return Grouped(one(x.values, over), one(x.scale, (*over[:x.scale.ndim - 1], None)))
    return one(x, over)
