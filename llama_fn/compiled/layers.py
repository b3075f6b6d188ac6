"""`jit_layers`: a step of the model, compiled by its layers."""

import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ParamSpec, Protocol, TypeVar, overload

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.compiled import whole_step as one_token
from llama_fn.compiled.compiler import obstacle, uncompiled
from llama_fn.compiled.cuda_graph import recorded
from llama_fn.compiled.inductor import ONE_LOOP
from llama_fn.compiled.jit import donated
from llama_fn.compiled.trace import compiled, part, plain
from llama_fn.model.block import block
from llama_fn.model.cache import AnyCache
from llama_fn.model.transformer import Params, forward, head
from llama_fn.modes import traced
from llama_fn.private import lacking

P = ParamSpec("P")
R = TypeVar("R")


class Forward(Protocol):
    """The type of `forward`."""

    def __call__(self, params: Params, tokens: Tensor, cache: AnyCache | None = None) -> tuple[Tensor, AnyCache]: ...


@overload
def jit_layers(f: Callable[P, R], donate: str | Sequence[str] = "cache") -> Callable[P, R]: ...
@overload
def jit_layers(*, donate: str | Sequence[str] = "cache") -> Forward: ...
def jit_layers(f: Callable[P, R] = forward, donate: str | Sequence[str] = "cache") -> Callable[P, R]:
    """`forward`, `trunk`, or a function that hands them `layer`, `head` and `trunk`, compiled by its parts: all layers
    share one compiled block, so that the first call takes as long for 80 of them as for one. The cache is written in
    place if it is donated, and a step's work follows its length. On a GPU, what a step launches is recorded.

    Only values are compiled: what is differentiated, mapped or traced runs as it is. Where nothing
    can be compiled, a warning says why, and all does.
    """
    if (reason := obstacle() or lacking()) is not None:
        warnings.warn(uncompiled(getattr(f, "__name__", "a step"), reason), stacklevel=2)
        return f
    layer = by_shape(block, donate, {"slots": 0, "cache": -2})
    in_place = "cache" in ((donate,) if isinstance(donate, str) else donate)
    parts = {"layer": layer, "head": _few_rows(by_shape(head)), "trunk": one_token.one_token if in_place else None}
    named = inspect.signature(f).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values()):
        parts = {name: part for name, part in parts.items() if name in named}  # `trunk` has no head
    return recorded(functools.partial(f, **parts))


def _few_rows(head: Callable) -> Callable:
    """`head`, and of few rows on a processor that has a kernel for it, that."""
    @functools.wraps(head)
    def called(*args: Any) -> Tensor:
        return head(*args) if (logits := one_token.head(*args)) is None else logits

    return called


def by_shape(f: Callable[P, R], donate: str | Sequence[str] = (),
             dynamic: Mapping[str, int] = MappingProxyType({}), cpu: Mapping[str, Any] = ONE_LOOP) -> Callable[P, R]:
    """`f` of positional trees, traced and compiled for every combination of shapes, but that of an argument which is
    `dynamic`, the axis named may be of any size. `cpu` are inductor's options there. `jit` does more, and takes more:
    five times as long to trace a layer, and 0.1 ms at each call to see what has changed.
    """
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    parameters = tuple(inspect.signature(f).parameters)
    axes = [dynamic.get(name) for name in parameters]
    known: dict[Hashable, list[Callable]] = {}

    @functools.wraps(f)
    def run(*args: Any) -> R:
        result = f(*args)
        given = {name: x for name in names if tree.leaves(x := args[parameters.index(name)])}
        return donated(given, result) if given else result

    @functools.wraps(f)
    def called(*args: Any) -> R:
        tensors: list[Tensor] = []
        rest: list[Any] = [torch.get_num_threads()]
        part(args, tensors, rest)
        if not traced():
            alike = known.setdefault(tuple(rest), [])
            for ready in alike:
                if (result := ready(tensors)) is not None:
                    return result
            if plain(tensors):
                alike.append(compiled(run, args, axes, cpu))
                return alike[-1](tensors)
        return f(*args)

    return called
