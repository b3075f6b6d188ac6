"""The axes: one vocabulary for every annotation and every einops string, and `typed`, which checks them.

    *b  leading batch axes, or none            k  key/value heads
    t   tokens in this call                    g  query heads that share one key/value head
    s   slots of the cache                     h  the width of one head
    d   the model's width                      f  the feed-forward's hidden width
    v   the vocabulary                         l  layers

Three more names help: `n` heads of any kind, `p` the pairs of a head that RoPE rotates (h = 2p), `o` the outputs of a
linear map. The annotations of one function belong together: an axis that appears twice has one size.
"""

import contextlib
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import jaxtyped
from torch import Tensor

from llama_fn import tree
from llama_fn.hints import check_of, gathered, message
from llama_fn.modes import traced

PLAIN = (bool, int, float, str, torch.dtype, torch.device)
P = ParamSpec("P")
R = TypeVar("R")


class AxesError(TypeError, ValueError):
    """A value has another type, dtype or axes than its annotation; a `TypeError` and a `ValueError`.

    >>> try:
    ...     lf.forward(params, tokens.float())
    ... except lf.AxesError as error:
    ...     print(error)
    """


def typed(f: Callable[P, R]) -> Callable[P, R]:
    """Check the axes of a function's arguments and of its result in every eager call, under transforms too.

    While ``torch.compile`` traces, the function runs as written, so a compiled graph has no checks. jaxtyping checks
    tensors, and beartype checks everything else; a ``NamedTuple`` is checked field by field. An integer is accepted as
    a float, and a bool is not a number. A check depends on types, shapes, dtypes and plain values alone, so each
    combination of them is checked once. With ``LLAMA_FN_TYPED=0`` in the environment at import, functions stay as
    written.

    Raises `AxesError`, which names the function, the argument, the axes expected and the shape given. A call with
    missing or unknown arguments raises Python's own `TypeError`.

    >>> @lf.typed
    ... def double(x: Float[Tensor, "*b t d"]) -> Float[Tensor, "*b t d"]:
    ...     return 2 * x
    """
    if os.environ.get("LLAMA_FN_TYPED", "1") == "0":
        return f
    signature = inspect.signature(f)
    hints = typing.get_type_hints(f, include_extras=True)
    checks = {name: check_of(hint if name == "return" else gathered(signature.parameters[name], hint))
              for name, hint in hints.items()}
    known: dict[tuple | None, set] = {}  # the facts of right arguments, each with the facts of right results

    def verify(arguments: dict[str, Any]) -> None:
        with jaxtyped("context"):
            for name, value in arguments.items():
                if name in checks and (wrong := checks[name](value, name)) is not None:
                    raise AxesError(message(f, *wrong))

    @functools.wraps(f)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if traced():
            return f(*args, **kwargs)
        given = _facts(args, kwargs)
        results = known.get(given)
        if results is None:
            verify(bind(f, signature, args, kwargs).arguments)
            if len(known) >= 4096:  # a caller with ever new shapes must not fill the memory
                known.clear()
            results = set() if given is None else known.setdefault(given, set())
        result = f(*args, **kwargs)
        returned = _facts(result)
        if returned is None or returned not in results:
            verify({**bind(f, signature, args, kwargs).arguments, "return": result})
            if returned is not None and len(results) < 64:
                results.add(returned)
        return result

    return checked


def bind(f: Callable, signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """`signature.bind`, but a wrong call raises the error that Python raises for `f`, with its name."""
    with contextlib.suppress(TypeError):
        return signature.bind(*args, **kwargs)
    f(*args, **kwargs)
    raise TypeError(f"{f} does not take these arguments")


def _facts(*values: Any) -> tuple | None:
    """All that a check can see of the values, as a hashable tuple; None where there is none, as for a list."""
    facts: list[Any] = []
    return tuple(facts) if _add_facts(values, facts) else None


def _add_facts(values: tuple, facts: list[Any]) -> bool:
    """Append the facts of each value, or return False at the first value whose facts are not known."""
    for x in values:
        kind = type(x)
        if kind is Tensor:
            facts += x.shape, x.dtype
        elif issubclass(kind, tuple | dict):
            facts += kind, len(x)
            if not _add_facts(x if isinstance(x, tuple) else tuple(x.items()), facts):
                return False
        elif isinstance(x, Tensor):
            facts += x.shape, x.dtype
        elif isinstance(x, types.FunctionType):
            facts.append(types.FunctionType)  # a check cannot see more of a function
        elif x is None or isinstance(x, PLAIN) or tree.is_constant(x):
            facts.extend((type(x), x))
        else:
            return False
    return True
