"""What crosses between devices: six linear maps, each with its transpose as its derivative.

Every device of a mesh runs the same program on its own part of the numbers. A tensor is either the *same* on all
devices of a mesh axis, or each device has its own *part*. So has its cotangent, and a transpose turns one into the
other (Shoeybi et al. 2019, "Megatron-LM", section 3, call `copied` and `summed` f and g):

    map         from             to              what is sent       its transpose   in JAX
    copied      the same         parts' input    nothing            summed          pvary
    summed      parts of a sum   the same        all-reduce         copied          psum
    gathered    slices           the same        all-gather         sliced
    sliced      the same         slices          nothing            gathered
    collected   slices           parts' input    all-gather         scattered       all_gather
    scattered   parts of a sum   slices of it    reduce-scatter     collected       psum_scatter

PyTorch's own differentiable collectives do not work under `torch.func`. These do, with all its transforms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from llama_fn import tree
from llama_fn.ops.operators import define
from llama_fn.private import collective, untraced


@tree.constant
@dataclass(frozen=True)
class MeshAxis:
    """One axis of a mesh as one device sees it: the axis's name and size, the device's index, and its group's name.

    >>> axes = params.norm.sharding.batch
    """

    name: str
    size: int
    index: int
    group: str


def copied(x: Tensor, axis: MeshAxis) -> Tensor:
    """The same x, of which each device computes a part of the result: the gradient is the sum of their gradients."""
    return _of_axis(x, "copied", None, axis)


def summed(x: Tensor, axis: MeshAxis) -> Tensor:
    """The sum of the devices' tensors, on each of them."""
    return _of_axis(x, "summed", None, axis)


def gathered(x: Tensor, dim: int, axis: MeshAxis) -> Tensor:
    """The devices' slices, one after another along `dim`; all devices then compute the same from the result."""
    return _of_axis(x, "gathered", dim % x.ndim, axis)


def sliced(x: Tensor, dim: int, axis: MeshAxis) -> Tensor:
    """The device's own slice along `dim` of what is the same on all devices."""
    return _of_axis(x, "sliced", dim % x.ndim, axis)


def collected(x: Tensor, dim: int, axis: MeshAxis) -> Tensor:
    """The devices' slices, one after another along `dim`; each device then computes from it with rows of its own."""
    return _of_axis(x, "collected", dim % x.ndim, axis)


def scattered(x: Tensor, dim: int, axis: MeshAxis) -> Tensor:
    """The device's own slice along `dim` of the sum of the devices' tensors."""
    return _of_axis(x, "scattered", dim % x.ndim, axis)


def largest(x: Tensor, axis: MeshAxis) -> Tensor:
    """The largest of the devices' numbers, place by place; its derivative is taken as 0."""
    return _of_axis(x.detach(), "largest", None, axis)


def _done(name: str, *args: Any) -> Tensor:
    return collective.wait_tensor(getattr(collective, name)(*args))


def _define(schema: str, empty: Callable[..., Tensor]) -> None:
    name = schema.partition("(")[0]
    define(schema, empty, CPU=partial(_done, name), CUDA=partial(_done, name))
    has_side_effect(getattr(torch.ops.llama_fn, name).default)  # as torch's own: never merged, never left out


# Each of these waits. A compiled graph begins all of torch's own collectives that it can before it waits for one. If
# several of gloo's all-gathers are at work, they destroy memory (torch 2.13: six at once crash after 2,000 rounds).
_define("all_reduce(Tensor x, str of, str group) -> Tensor", lambda x, of, group: torch.empty_like(x))
_define("all_gather_into_tensor(Tensor x, int size, str group) -> Tensor",
        lambda x, size, group: x.new_empty((size * x.shape[0], *x.shape[1:])))
_define("reduce_scatter_tensor(Tensor x, str of, int size, str group) -> Tensor",
        lambda x, of, size, group: x.new_empty((x.shape[0] // size, *x.shape[1:])))


def _run(name: str, x: Tensor, *rest: Any) -> Tensor:
    """A collective. On a GPU it runs beside what does not wait for it."""
    x = x.contiguous()
    return _done(name, x, *rest) if x.is_cuda else getattr(torch.ops.llama_fn, name)(x, *rest)


def _all_reduce(x: Tensor, axis: MeshAxis, of: str = "sum") -> Tensor:
    return _run("all_reduce", x, of, axis.group)


def _all_gather(x: Tensor, dim: int, axis: MeshAxis) -> Tensor:
    return _run("all_gather_into_tensor", x.movedim(dim, 0), axis.size, axis.group).movedim(0, dim)


def _reduce_scatter(x: Tensor, dim: int, axis: MeshAxis) -> Tensor:
    return _run("reduce_scatter_tensor", x.movedim(dim, 0), "sum", axis.size, axis.group).movedim(0, dim)


def _slice(x: Tensor, dim: int, axis: MeshAxis) -> Tensor:
    size = x.shape[dim] // axis.size
    return x.narrow(dim, axis.index * size, size).clone()


def _linear_map(compute: Callable[..., Tensor], transpose: Callable[..., Tensor]) -> type[torch.autograd.Function]:
    """The map `compute(x, *rest)`, whose derivative is `transpose(cotangent, *rest)`; the last of `rest` is an axis."""
    class LinearMap(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, *rest: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return compute(x, *rest)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            ctx.rest = inputs[1:]

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
            return transpose(cotangent, *ctx.rest), *(None for _ in ctx.rest)

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return LinearMap.apply(tangent, *ctx.rest)

        @staticmethod
        def vmap(info: Any, in_dims: tuple, x: Tensor, *rest: Any) -> tuple[Tensor, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
            *dims, axis = rest
            return LinearMap.apply(x.movedim(in_dims[0], 0), *(dim + 1 for dim in dims), axis), 0

    return LinearMap


_MAPS = {
    "copied": _linear_map(lambda x, axis: x.view_as(x), summed),
    "summed": _linear_map(_all_reduce, copied),
    "gathered": _linear_map(_all_gather, sliced),
    "sliced": _linear_map(_slice, gathered),
    "collected": _linear_map(_all_gather, scattered),
    "scattered": _linear_map(_reduce_scatter, collected),
    "largest": _linear_map(lambda x, axis: _all_reduce(x, axis, "max"), lambda cotangent, axis: 0 * cotangent),
}


@untraced
def _applied(x: Tensor, name: str, dim: int | None, *axis: Any) -> Tensor:
    """A map of x. A graph of dynamo can hold its arguments: tensors, numbers and text."""
    rest = (MeshAxis(*axis),) if dim is None else (dim, MeshAxis(*axis))
    return _MAPS[name].apply(x, *rest)


def _of_axis(x: Tensor, name: str, dim: int | None, axis: MeshAxis) -> Tensor:
    return _applied(x, name, dim, axis.name, axis.size, axis.index, axis.group)
