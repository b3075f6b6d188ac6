"""`jit`: a pure function of trees, compiled, with JAX's donation of arguments."""

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from llama_fn import tree
from llama_fn.compiled.compiler import obstacle, uncompiled
from llama_fn.private import allow_shapes
from llama_fn.shapes import bind

P = ParamSpec("P")
R = TypeVar("R")

MAX_SHAPES = 64  # compilations of one function; torch gives up after 8


def jit(f: Callable[P, R], donate: str | Sequence[str] = ()) -> Callable[P, R]:
    """`f` compiled as one graph for every combination of shapes: the same signature and, up to rounding, same results.

    An argument named in `donate` (JAX's ``donate_argnames``) gives its memory to the part of the result that has
    the same structure, shapes and dtypes. So a decode step that donates its cache writes one slot and copies nothing.
    A donated value must not be used again: its memory holds the new one. No other part of the result may be a view of
    it.

    Transforms go inside: `jit(vmap(f))`, not `vmap(jit(f))`. Raises `ValueError` for a donated name that `f` does not
    have; a call raises torch's ``Unsupported`` for one that no part of the result can take. Where nothing can be
    compiled (no C++ compiler that works, no folder that can be written to), a warning says so, and `f` runs as it is.

    >>> step = lf.jit(lf.forward, donate="cache")
    """
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    called = getattr(f, "__name__", type(f).__name__)  # a functools.partial has none
    signature = inspect.signature(f)
    if unknown := [name for name in names if name not in signature.parameters]:
        raise ValueError(f"jit: {called} has no argument {unknown[0]!r} to donate, "
                         f"only {', '.join(signature.parameters)}")

    if (reason := obstacle()) is not None:
        warnings.warn(uncompiled(called, reason), stacklevel=2)
        return f

    def body(*args: P.args, **kwargs: P.kwargs) -> R:
        result = f(*args, **kwargs)
        arguments = dict(zip(signature.parameters, args, strict=False)) | kwargs
        given = {name: arguments[name] for name in names if tree.leaves(arguments.get(name))}
        return donated(given, result) if given else result

    # Dynamo limits the compilations of each code object, so every jitted function needs a code object of its own.
    own = types.FunctionType(body.__code__.replace(), body.__globals__, called, None, body.__closure__)
    allow_shapes(MAX_SHAPES)
    compiled = torch.compile(own, fullgraph=True, dynamic=False)

    @functools.wraps(f)
    def jitted(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return compiled(*args, **kwargs)
        except Exception:
            bind(f, signature, args, kwargs)  # Python's error for a wrong call says more than dynamo's
            raise

    return jitted


def donated(given: dict[str, Any], result: Any) -> Any:
    """`result`, with each part that is like a donated argument moved into that argument's memory."""
    parts = list(result) if type(result) is tuple else [result]
    places: dict[str, int] = {}
    for name, old in given.items():
        like = [i for i, part in enumerate(parts) if i not in places.values() and _kind(part) == _kind(old)]
        if not like:
            raise ValueError(f"jit: no part of the result has the structure, shapes and dtypes of the donated `{name}`")
        places[name] = like[0]
    memories = [x for old in given.values() for x in tree.leaves(old)]

    def handed_on(x: Any) -> bool:
        return any(x is memory for memory in memories)

    # A donated leaf that comes back in its own place stays. A part that holds one in another place is copied instead of
    # moved: to move it into a second donated leaf, that leaf would have to be saved first, and inductor removes such a
    # copy as superfluous.
    fresh = {}
    for i, part in enumerate(parts):
        old = next((given[name] for name, place in places.items() if place == i), None)
        own = [None] * len(tree.leaves(part)) if old is None else tree.leaves(old)
        if any(handed_on(x) and x is not memory for x, memory in zip(tree.leaves(part), own, strict=True)):
            parts[i] = tree.map(lambda x: x.clone() if handed_on(x) else x, part)
        elif old is not None:
            fresh[i] = old
    for i, old in fresh.items():
        parts[i] = tree.map(lambda memory, new: memory if new is memory else memory.copy_(new), old, parts[i])
    return tuple(parts) if type(result) is tuple else parts[0]


def _kind(part: Any) -> tuple:
    leaves, structure = tree.flatten(part)
    return structure, [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves]
