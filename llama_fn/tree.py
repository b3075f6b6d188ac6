"""The pytree words of the project, over `torch.utils._pytree`, which only this file imports.

A tree is a leaf, or a tuple, list, dict or `NamedTuple` of trees. As in JAX, `None` is a tree without leaves.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

T = TypeVar("T")


def map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`f` over the leaves of one tree, or over corresponding leaves of several of the same structure.

    Where the first has a leaf, the others may have a tree, which `f` gets whole.
    """
    return _pytree.tree_map(lambda x, *xs: None if x is None else f(x, *xs), tree, *rest)


def leaves(tree: Any) -> list:
    """The leaves, left to right."""
    return [x for x in _pytree.tree_leaves(tree) if x is not None]


def flatten(tree: Any) -> tuple[list, Any]:
    """The leaves and the structure that `unflatten` puts them back into (here a `None` keeps its place)."""
    return _pytree.tree_flatten(tree)


def unflatten(leaves: list, structure: Any) -> Any:
    """The inverse of `flatten`."""
    return _pytree.tree_unflatten(leaves, structure)


def structure(tree: Any) -> Any:
    """A tree's shape without its leaves; equal for trees that `map` may take together."""
    return _pytree.tree_structure(tree)


def paths(tree: Any) -> dict[str, Any]:
    """Each leaf under its path, the field names and indices joined by dots: `blocks.0.attention.wq`."""
    pairs, _ = _pytree.tree_flatten_with_path(tree)
    return {".".join(_step(entry) for entry in path): x for path, x in pairs if x is not None}


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """As `map`, with each leaf's path as the first argument of `f`."""
    return _pytree.tree_map_with_path(
        lambda path, x, *xs: None if x is None else f(".".join(_step(entry) for entry in path), x, *xs), tree, *rest)


def vdot(tree: Any, other: Any) -> Tensor:
    """The dot product of two trees of tensors as one long vector each, in float32 at least (Optax's `tree.vdot`)."""

    def dot(x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape:  # or the smaller one would be broadcast
            raise ValueError(f"tree.vdot: corresponding leaves must have one shape, got {[*x.shape]} and {[*y.shape]}")
        exact = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        return (x.to(exact) * y.to(exact)).sum()

    return torch.stack(leaves(map(dot, tree, other))).sum()


def constant(cls: type[T]) -> type[T]:
    """Register a frozen, hashable class as a tree without leaves: it travels inside a tree, part of its structure."""
    _pytree.register_constant(cls)
    return cls


def is_constant(x: Any) -> bool:
    """Whether a value is of such a class."""
    return _pytree.is_constant_class(type(x))


def _step(entry: Any) -> str:
    for name in ("name", "key", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)
