"""`jit`: a pure function of trees, compiled, with JAX's donation of arguments."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from llama_fn import tree

P = ParamSpec("P")
R = TypeVar("R")


def jit(f: Callable[P, R], donate: str | Sequence[str] = ()) -> Callable[P, R]:
    """`f` compiled as one graph: the same signature and, up to rounding, the same results.

    The memory of an argument named in `donate` (JAX's `donate_argnames`) takes the part of the result that has its
    structure, shapes and dtypes: a decode step that donates its cache writes one slot and copies nothing. A donated
    value must not be used again: it holds the new one.

    Transforms go inside: `jit(vmap(f))`, not `vmap(jit(f))`. Raises `ValueError` for a donated name that `f` does not
    have, and while compiling for one that no part of the result can take.
    """
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    signature = inspect.signature(f)
    if unknown := [name for name in names if name not in signature.parameters]:
        raise ValueError(f"jit: {f.__name__} has no argument {unknown[0]!r} to donate, "
                         f"only {', '.join(signature.parameters)}")

    def body(*args: P.args, **kwargs: P.kwargs) -> R:
        result = f(*args, **kwargs)
        arguments = dict(zip(signature.parameters, args, strict=False)) | kwargs
        whole = type(result) is tuple
        parts, taken = list(result) if whole else [result], set()
        for name in names:
            if arguments.get(name) is not None:
                at = _place(arguments[name], parts, taken, name)
                parts[at] = tree.map(lambda memory, new: memory.copy_(new), arguments[name], parts[at])
                taken.add(at)
        return tuple(parts) if whole else parts[0]

    return functools.wraps(f)(torch.compile(body, fullgraph=True, dynamic=False))


def _place(old: Any, parts: list, taken: set[int], name: str) -> int:
    """Which part of the result is like `old`, the first that is not taken already."""
    for i, part in enumerate(parts):
        if i not in taken and _kind(part) == _kind(old):
            return i
    raise ValueError(f"jit: no part of the result has the structure, shapes and dtypes of the donated `{name}`")


def _kind(part: Any) -> tuple:
    leaves, structure = tree.flatten(part)
    return structure, [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves]
