"""Functions on pytrees: tuples, lists, dicts and named tuples of tensors, nested in any way.

A tree is a leaf, or a container of trees. As in JAX, None is a tree without leaves. The functions stand on
``torch.utils._pytree``, which only this file imports.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = ["constant", "flatten", "is_constant", "leaves", "map", "map_with_path", "paths", "structure", "unflatten",
           "vdot"]

T = TypeVar("T")


def map(f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Apply a function to every leaf of a tree, or to the corresponding leaves of several trees.

    This is JAX's ``jax.tree.map``. The result has the structure of the first tree. The others may have a whole tree
    where the first has a leaf: ``f`` then takes that tree. Raises `ValueError` for trees whose structures differ
    otherwise. ``is_leaf`` says of a tree whether ``f`` takes it whole.

    >>> halves = lf.tree.map(lambda x: x.half(), params)
    """
    return _pytree.tree_map(lambda x, *xs: None if x is None else f(x, *xs), tree, *rest, is_leaf=is_leaf)


def leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list:
    """The leaves of a tree, from left to right; ``is_leaf`` is that of `lf.tree.map`.

    >>> count = sum(x.numel() for x in lf.tree.leaves(params))
    """
    return [x for x in _pytree.tree_leaves(tree, is_leaf) if x is not None]


def flatten(tree: Any) -> tuple[list, Any]:
    """The leaves of a tree, and its structure, from which `lf.tree.unflatten` makes the tree again.

    Unlike `lf.tree.leaves`, the list has a None where the tree has one.

    >>> leaves, structure = lf.tree.flatten(params)
    """
    return _pytree.tree_flatten(tree)


def unflatten(leaves: list, structure: Any) -> Any:
    """The tree of a structure with these leaves; the inverse of `lf.tree.flatten`.

    Raises `ValueError` for another number of leaves than the structure has.

    >>> params = lf.tree.unflatten(*lf.tree.flatten(params))
    """
    return _pytree.tree_unflatten(leaves, structure)


def structure(tree: Any) -> Any:
    """The structure of a tree, without its leaves.

    `lf.tree.map` takes trees together whose structures are equal.

    >>> assert lf.tree.structure(grads) == lf.tree.structure(params)
    """
    return _pytree.tree_structure(tree)


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """A dict of the leaves by their paths: field names, keys and indices, joined by dots.

    ``is_leaf`` is that of `lf.tree.map`.

    >>> wq = lf.tree.paths(params)["blocks.0.attention.wq"]
    """
    pairs, _ = _pytree.tree_flatten_with_path(tree, is_leaf)
    return {".".join(_step(entry) for entry in path): x for path, x in pairs if x is not None}


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Apply a function as `lf.tree.map` does, where the function takes each leaf's path, then the leaf.

    Paths are those of `lf.tree.paths`, and ``is_leaf`` is that of `lf.tree.map`.

    >>> mixed = lf.tree.map_with_path(lambda path, x: x if "norm" in path else x.bfloat16(), params)
    """
    return _pytree.tree_map_with_path(
        lambda path, x, *xs: None if x is None else f(".".join(_step(entry) for entry in path), x, *xs), tree, *rest,
        is_leaf=is_leaf)


def vdot(tree: Any, other: Any) -> Tensor:
    """The dot product of two trees of tensors, each taken as one long vector; Optax's ``tree.vdot``.

    It is computed in float32 at least. A value in a tree may have a method ``vdot`` of its own, as a weight with parts
    on other devices (`lf.mesh.Sharded`), whose products are added up over them. Raises `ValueError` for corresponding
    leaves of different shapes.

    >>> norm = lf.tree.vdot(grads, grads).sqrt()
    """

    def dot(x: Any, y: Any) -> Tensor:
        if not isinstance(x, Tensor):
            return x.vdot(y)
        if not isinstance(y, Tensor):
            raise ValueError(f"tree.vdot: a leaf is a tensor in one tree and {type(y).__name__} in the other")
        if x.shape != y.shape:  # or the smaller one would be broadcast
            raise ValueError(f"tree.vdot: corresponding leaves must have one shape, got {[*x.shape]} and {[*y.shape]}")
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        return (x.to(dtype) * y.to(dtype)).sum()

    def is_leaf(x: Any) -> bool:
        return not isinstance(x, Tensor) and hasattr(x, "vdot")

    return torch.stack(leaves(map(dot, tree, other, is_leaf=is_leaf))).sum()


def constant(cls: type[T]) -> type[T]:
    """Register a class as a tree without leaves, so that its values may stand in a tree.

    This is a decorator of frozen dataclasses. A value is part of the tree's structure: transforms neither map nor
    differentiate it. It has to be hashable. `lf.Config` is such a class.

    >>> @lf.tree.constant
    ... @dataclasses.dataclass(frozen=True)
    ... class Scale:
    ...     alpha: float
    """
    _pytree.register_constant(cls)
    return cls


def is_constant(x: Any) -> bool:
    """Whether the class of a value was registered by `lf.tree.constant`.

    >>> assert lf.tree.is_constant(params.config)
    """
    return _pytree.is_constant_class(type(x))


def _step(entry: Any) -> str:
    for name in ("name", "key", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)
