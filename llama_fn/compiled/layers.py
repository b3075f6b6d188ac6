"""`jit_layers`: a step of the model, compiled by its layers."""

import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.compiled import compiler
from llama_fn.compiled.compiler import uncompiled
from llama_fn.compiled.cuda_graph import recorded
from llama_fn.compiled.inductor import ONE_LOOP
from llama_fn.compiled.jit import donated
from llama_fn.compiled.trace import collect, compiled
from llama_fn.compiled.whole_step import fused_head, fused_trunk
from llama_fn.model.block import block
from llama_fn.model.cache import AnyCache
from llama_fn.model.transformer import Params, forward, head
from llama_fn.modes import plain, traced
from llama_fn.private_inductor import lacking

P = ParamSpec("P")
R = TypeVar("R")


class Forward(Protocol):
    """The type of `forward`."""

    def __call__(self, params: Params, tokens: Tensor, cache: AnyCache | None = None) -> tuple[Tensor, AnyCache]:
        """The logits and the new cache."""
        ...


@overload
def jit_layers(f: Callable[P, R], donate: str | Sequence[str] = "cache") -> Callable[P, R]: ...
@overload
def jit_layers(*, donate: str | Sequence[str] = "cache") -> Forward: ...
def jit_layers(f: Callable[..., Any] = forward, donate: str | Sequence[str] = "cache") -> Callable[..., Any]:
    """A decode step compiled by its parts, with the signature and, up to rounding, the results of `f`.

    `f` is `forward`, ``trunk``, or a function that hands them ``layer``, ``head`` and ``trunk``. All layers share one
    compiled block, so that the first call takes as long for 80 layers as for one. If the cache is donated, it is
    written in place. A step reads as many slots of the cache as its length needs. On a GPU, the launches of a step are
    recorded and replayed as one (``cuda_graph.py``).

    Only plain values are compiled: what is differentiated, mapped or traced runs as it is. Where nothing can be
    compiled, a warning says why, and everything runs as it is.

    >>> step = lf.jit_layers()  # compiles one layer for all
    """
    if (reason := obstacle()) is not None:
        warnings.warn(uncompiled(getattr(f, "__name__", "a step"), reason), stacklevel=2)
        return f
    return by_layers(f, donate)


def obstacle() -> str | None:
    """Why nothing can be compiled here: what `compiler.obstacle` says, or what this torch lacks."""
    return compiler.obstacle() or lacking()


def by_layers(f: Callable[P, R], donate: str | Sequence[str] = "cache") -> Callable[P, R]:
    """`jit_layers`, where it is known that there is no `obstacle`."""
    layer = by_shape(block, donate, {"slots": 0, "cache": -2})
    in_place = "cache" in ((donate,) if isinstance(donate, str) else donate)
    parts = {"layer": layer, "head": _few_rows(by_shape(head)), "trunk": fused_trunk() if in_place else None}
    named = inspect.signature(f).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values()):
        parts = {name: part for name, part in parts.items() if name in named}  # ``trunk`` has no head
    return recorded(functools.partial(f, **parts))


def _few_rows(head: Callable) -> Callable:
    """``head``, and the fused kernel instead wherever that accepts the arguments."""
    @functools.wraps(head)
    def called(*args: Any) -> Tensor:
        return head(*args) if (logits := fused_head(*args)) is None else logits

    return called


def by_shape(f: Callable[P, R], donate: str | Sequence[str] = (),
             dynamic: Mapping[str, int] = MappingProxyType({}), cpu: Mapping[str, Any] = ONE_LOOP) -> Callable[P, R]:
    """`f` of positional trees, traced and compiled for every combination of shapes.

    `dynamic` names arguments and for each an axis that may have any size; `cpu` are options for inductor on a CPU.
    `jit` accepts more functions, but takes five times as long to trace a layer, and 0.1 ms a call to look for changes.
    """
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    parameters = tuple(inspect.signature(f).parameters)
    axes = [dynamic.get(name) for name in parameters]
    known: dict[Hashable, list[Callable]] = {}  # what is compiled, by everything in the arguments that is no tensor
    plain_f = cast("Callable[..., R]", f)

    @functools.wraps(f)
    def run(*args: Any) -> R:
        result = plain_f(*args)
        given = {name: x for name in names if tree.leaves(x := args[parameters.index(name)])}
        return donated(given, result) if given else result

    @functools.wraps(f)
    def called(*args: Any) -> R:
        tensors: list[Tensor] = []
        rest: list[Any] = [torch.get_num_threads()]
        collect(args, tensors, rest)
        if not traced():
            alike = known.setdefault(tuple(rest), [])
            for ready in alike:
                if (result := ready(tensors)) is not None:
                    return result
            if plain(tensors):
                alike.append(compiled(run, args, axes[:len(args)], cpu))
                return alike[-1](tensors)
        return plain_f(*args)

    return cast("Callable[P, R]", called)
