"""Weights with an open door: a parameter is a tensor, or any value that says how it multiplies.

The mathematics asks three things of a weight W: the linear map W x, the product W * x number by number, and rows of W
by their numbers. A value in a weight's place has the `shape` and `dtype` of W, which are checked like a tensor's, and
the methods for what is asked of it there. LoRA, per-sample gradients and quantization each bring such values.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.modes import transforms


class Shaped(Protocol):
    """What every value in a weight's place has."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        ...


@runtime_checkable
class Multiplies(Shaped, Protocol):
    """A value in the place of a matrix."""

    def linear(self, x: Tensor, inputs: int) -> Tensor:
        """W x, summed over the last `inputs` axes of W and of x."""
        ...


@runtime_checkable
class Scales(Shaped, Protocol):
    """A value in the place of a vector."""

    def scale(self, x: Tensor) -> Tensor:
        """W * x, number by number."""
        ...


@runtime_checkable
class LooksUp(Shaped, Protocol):
    """A value in the place of a table."""

    def look_up(self, numbers: Tensor) -> Tensor:
        """The rows of W with these numbers."""
        ...


class Divided(Shaped, Protocol):
    """A part of a weight whose other parts are on other devices, which run the same program."""

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the weight with all its parts."""
        ...

    @property
    def divides_rows(self) -> bool:
        """Whether each device has rows of its own."""
        ...

    def several(self, weights: Sequence[Any], x: Tensor) -> list[Tensor]:
        """The linear map of each of these weights, which are divided as this one is, with the same x."""
        ...


def on_one_device(what: str, values: Any) -> None:
    """Raise `ValueError` if a tree has weights whose parts are on several devices."""
    if any(map(is_divided, tree.leaves(values, is_divided))):
        raise ValueError(f"{what}: the weights are divided over devices; call it on lf.mesh.unshard(params)")


def with_all_rows(what: str, values: Any) -> None:
    """Raise `ValueError` if a tree has weights of a plan by which each device has rows of its own."""
    if any(is_divided(x) and x.divides_rows for x in tree.leaves(values, is_divided)):
        raise ValueError(f"{what}: the plan divides the rows, and a loss is that of all devices' rows; shard the "
                         "parameters by a plan without *b, and give every device all rows")


def is_divided(x: Any) -> bool:
    """Whether a value is `Divided`. Its class tells, also while dynamo traces."""
    return hasattr(type(x), "several")


def whole_shape(weight: Any) -> tuple[int, ...]:
    """The shape of a weight with all its parts, on whatever devices they are."""
    return tuple(weight.whole if hasattr(type(weight), "whole") else weight.shape)


if TYPE_CHECKING:  # so that `params.output + 1` is right, which for nearly all parameters it is
    Matrix: TypeAlias = Tensor
    Vector: TypeAlias = Tensor
    Table: TypeAlias = Tensor
else:
    Matrix, Vector, Table = Tensor | Multiplies, Tensor | Scales, Tensor | LooksUp


def values_alone(x: Tensor) -> bool:
    """Whether no gradient of x is recorded and no transform runs, so that a kernel without derivatives may."""
    return not x.requires_grad and not transforms()
