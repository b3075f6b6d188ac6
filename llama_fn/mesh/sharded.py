"""A sharded weight: this device's part of it, and how the whole is divided. It stands in a weight's place.

The mathematics of the model stays as it is: each device runs it on its own parts, as under JAX's ``shard_map``, and a
sharded weight says how it multiplies. An axis is divided in one of two ways.

- The axes k, f and v over a mesh axis that does not divide the rows (tensor parallelism, Shoeybi et al. 2019): each
  device computes with its heads, its hidden numbers or its part of the vocabulary alone. A matrix whose *outputs* are
  divided (``wq``, ``w_gate``) sends nothing. One whose *inputs* are divided (``wo``, ``w_down``) adds up the devices'
  results: one all-reduce for attention and one for the feed-forward, forward and backward.
- Any other axis, and any axis over the mesh axis that divides the rows (Rajbhandari et al. 2020, "ZeRO", stage 3;
  FSDP): each device keeps its part, and the whole weight is gathered where it is used. The gradient is added up over
  the rows' devices, and each keeps its part of the sum.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.mesh.collectives import MeshAxis, collected, copied, gathered, summed
from llama_fn.mesh.sharding import LOCAL, VOCABULARY, Sharding, check_leaf, cut, joined
from llama_fn.model.init import Weight
from llama_fn.model.linear import linear, linears
from llama_fn.model.transformer import embed


class Sharded(NamedTuple):
    """A weight of which this device has the part `local`; a value in a weight's place.

    >>> norm: lf.mesh.Sharded = params.norm
    """

    local: Any  # a tensor, or another value in a weight's place
    sharding: Sharding

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with which this device computes: its own part of heads and hidden numbers, and all of the rest."""
        own = self.sharding
        return tuple(size if axis is None or (own.is_local(i) and own.axes[i] in LOCAL) else size * axis.size
                     for i, (size, axis) in enumerate(zip(self.local.shape, own.over, strict=True)))

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the weight with all its parts."""
        return tuple(n if axis is None else n * axis.size
                     for n, axis in zip(self.local.shape, self.sharding.over, strict=True))

    @property
    def divides_rows(self) -> bool:
        """Whether each device has rows of its own."""
        return bool(self.sharding.batch)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        """Where this device's part lies."""
        return self.local.device

    def gathered(self) -> Any:
        """The weight with which this device computes: whole but for heads, hidden numbers and vocabulary."""
        own, weight = self.sharding, self.local
        for i, axis in enumerate(own.over):
            if axis is not None and not own.is_local(i):
                weight = collected(weight, i, axis) if axis in own.batch else gathered(weight, i, axis)
        for axis in own.batch:
            if axis not in own.over and isinstance(weight, Tensor):  # integers have no gradient
                weight = copied(weight, axis)
        return weight

    def linear(self, x: Tensor, inputs: int) -> Tensor:
        """The linear map y = W x. Divided outputs stay divided, but logits are gathered."""
        own, outer = self.sharding, len(self.sharding.axes) - inputs
        for axis in own.local(range(outer)):
            x = copied(x, axis)
        y = linear(self.gathered(), x, inputs)
        for axis in own.local(range(outer, len(own.axes))):
            y = summed(y, axis)
        return y if (axis := vocabulary_over(self)) is None else gathered(y, -1, axis)

    def scale(self, x: Tensor) -> Tensor:
        """W * x, number by number."""
        return self.gathered() * x

    def look_up(self, numbers: Tensor) -> Tensor:
        """The rows of W with these numbers. Of a divided table, each device adds the rows that it has."""
        weight, axis = self.gathered(), vocabulary_over(self)
        if axis is None:
            return embed(weight, numbers)
        size = weight.shape[0]
        own, here = place_in_part(numbers, size, axis)
        rows = embed(weight, own.where(here, 0)).masked_fill(~here[..., None], 0)
        outside = (numbers < 0) | (numbers >= size * axis.size)
        return summed(rows, axis).masked_fill(outside[..., None], torch.nan)

    def vdot(self, other: "Sharded") -> Tensor:
        """The dot product of two weights that are divided alike; a number on many devices counts once.

        Raises `ValueError` for one that is not divided like this one.
        """
        if not is_sharded(other) or other.sharding != self.sharding:
            raise ValueError("tree.vdot: corresponding leaves must be divided alike; lf.mesh.shard both by one plan")
        dot = tree.vdot(self.local, other.local)
        for axis in self.sharding.over:
            if axis is not None:
                dot = summed(dot, axis)
        return dot

    def several(self, weights: Sequence["Sharded"], x: Tensor) -> list[Tensor]:
        """The linear maps of weights with the same divided outputs; the gradient of x is added up in one all-reduce."""
        for axis in self.sharding.local(range(len(self.sharding.axes) - 1)):
            x = copied(x, axis)
        return linears([weight.gathered() for weight in weights], x)

    def converted(self, path: str, weight: Weight, convert: Callable[[str, Weight, Any], Any]) -> "Sharded":
        """`convert` of the whole weight, divided as this one is. Every device has the whole weight meanwhile.

        Raises `ValueError` for a quantized weight that cannot be divided so.
        """
        whole = convert(path, weight, joined(self.local, self.sharding))
        check_leaf(path, weight, whole, self.sharding)
        return Sharded(cut(whole, self.sharding), self.sharding)


def is_sharded(x: Any) -> bool:
    """Whether a tree is a sharded weight."""
    return isinstance(x, Sharded)


def vocabulary_over(weight: Any) -> MeshAxis | None:
    """The mesh axis over which the devices compute with their own part of the vocabulary; None if they do not."""
    own = weight.sharding if is_sharded(weight) else Sharding((), (), ())
    return own.over[0] if own.axes[:1] == (VOCABULARY,) and own.is_local(0) else None


def place_in_part(numbers: Tensor, size: int, axis: MeshAxis) -> tuple[Tensor, Tensor]:
    """Where numbers of the vocabulary stand in the device's own part of so many, and whether they do."""
    own = numbers - axis.index * size
    return own, (own >= 0) & (own < size)


def gathered_once(weight: Any) -> Any:
    """The weight, gathered now, so that several uses of it gather nothing."""
    if not is_sharded(weight):
        return weight
    own = weight.sharding
    over = tuple(axis if own.is_local(i) else None for i, axis in enumerate(own.over))
    return Sharded(weight.gathered(), Sharding(own.axes, over, ()))


def total(weight: Any, x: Tensor) -> Tensor:
    """The sum of x over the devices that have other rows of the batch than this one; x, if the weight is whole."""
    for axis in weight.sharding.batch if is_sharded(weight) else ():
        x = summed(x, axis)
    return x


def squared_norm(tree_of_weights: Any) -> Tensor:
    """The sum of the squares of all numbers in a tree, in float32 at least; a number on many devices counts once."""
    apart: dict[tuple[MeshAxis, ...], list[Tensor]] = {}  # by the mesh axes over which leaves are divided
    for x in tree.leaves(tree_of_weights, is_sharded):
        over = tuple(axis for axis in x.sharding.over if axis is not None) if is_sharded(x) else ()
        apart.setdefault(over, []).append(_square(x.local if is_sharded(x) else x))
    sums = []
    for over, squares in apart.items():
        square = torch.stack(squares).sum()
        for axis in over:
            square = summed(square, axis)
        sums.append(square)
    return torch.stack(sums).sum()


def _square(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum()
