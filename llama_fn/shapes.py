"""The axes: one vocabulary for every annotation and every einops string, and `typed`, which checks it.

    *b  leading batch axes, none included      k  key/value heads
    t   tokens in this call                    g  query heads that share one key/value head
    s   slots of the cache                     h  the width of one head
    d   the model's width                      f  the feed-forward's hidden width
    v   the vocabulary                         l  layers

Three helpers complete it: `n` heads of any kind, `p` the pairs of a head that RoPE rotates (h = 2p), `o` an
output axis. A function's annotations share one scope: an axis that appears twice has one size.
"""

import contextlib
import functools
import inspect
import io
import os
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, Union

import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped, print_bindings
from torch import Tensor

from llama_fn import tree
from llama_fn.modes import traced
from llama_fn.ranges import is_integer, is_number

PLAIN = (bool, int, float, str, torch.dtype, torch.device)
P = ParamSpec("P")
R = TypeVar("R")
TOWER = BeartypeConf(is_pep484_tower=True)  # an int is a number wherever a float is meant


class AxesError(TypeError, ValueError):
    """A value whose type, dtype or axes are not those of the annotation."""


def typed(f: Callable[P, R]) -> Callable[P, R]:
    """Check the axes of `f`'s arguments and result whenever it runs in eager mode, under `vmap` and `grad` too.

    Inside `torch.compile` the raw function runs, so a compiled graph carries no check (and breaks at none).
    Tensors are checked by jaxtyping, everything else by beartype; a `NamedTuple` is checked field by field in
    the scope of the call. An int passes where a float is meant, and a bool is no number. What a check says depends
    on types, shapes, dtypes and plain values alone, so each combination of them is checked once and then known.
    `LLAMA_FN_TYPED=0` in the environment at import leaves every function as written.

    Raises `AxesError`, naming the function, the argument, the axes wanted, and the shape given; and for arguments that
    the function does not take, or lacks, the `TypeError` that Python itself raises.
    """
    if os.environ.get("LLAMA_FN_TYPED", "1") == "0":
        return f
    signature = inspect.signature(f)
    hints = typing.get_type_hints(f, include_extras=True)
    checks = {name: _check(hint if name == "return" else _gathered(signature.parameters[name], hint))
              for name, hint in hints.items()}
    known: dict[tuple, set] = {}  # of arguments that are right, the results that are

    def verify(arguments: dict[str, Any]) -> None:
        with jaxtyped("context"):
            for name, value in arguments.items():
                if name in checks and (wrong := checks[name](value, name)) is not None:
                    raise AxesError(_message(f, *wrong))

    @functools.wraps(f)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if traced():
            return f(*args, **kwargs)
        given = _facts(args, kwargs)
        results = known.get(given)
        if results is None:
            verify(bind(f, signature, args, kwargs).arguments)
            if len(known) >= 4096:  # a caller of ever new shapes must not fill the memory
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
    """`signature.bind`, but for a wrong call the error is Python's own, of a call of `f`: it says the function's name.
    """
    with contextlib.suppress(TypeError):
        return signature.bind(*args, **kwargs)
    f(*args, **kwargs)
    raise TypeError(f"{f} does not take these arguments")


def _facts(*values: Any) -> tuple | None:
    """All that a check can see of values, hashable; None where it cannot be told in short, as of a list."""
    facts: list[Any] = []
    return tuple(facts) if _told(values, facts) else None


def _told(values: tuple, facts: list[Any]) -> bool:
    for x in values:
        kind = type(x)
        if kind is Tensor:
            facts += x.shape, x.dtype
        elif issubclass(kind, tuple | dict):
            facts += kind, len(x)
            if not _told(x if isinstance(x, tuple) else tuple(x.items()), facts):
                return False
        elif isinstance(x, Tensor):
            facts += x.shape, x.dtype
        elif isinstance(x, types.FunctionType):
            facts.append(types.FunctionType)  # a check sees no more of it
        elif x is None or isinstance(x, PLAIN) or tree.is_constant(x):
            facts.extend((type(x), x))
        else:
            return False
    return True


# --- how a hint becomes a check: a function of (value, where) to None, or to (where, hint, value) of what is wrong


def _check(hint: Any) -> Callable[[Any, str], tuple[str, Any, Any] | None]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_array(hint):
        return lambda value, where: None if isinstance(value, hint) else (where, hint, value)
    if inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        fields = [(name, _check(h)) for name, h in typing.get_type_hints(hint, include_extras=True).items()]

        def named_tuple(value, where):
            if not isinstance(value, hint):
                return where, hint, value
            wrongs = (check(getattr(value, name), f"{where}.{name}") for name, check in fields)
            return next((wrong for wrong in wrongs if wrong is not None), None)

        return named_tuple
    if origin in (list, Sequence) or (origin is tuple and args[1:] == (Ellipsis,)):
        item = _check(args[0])  # beartype would look at one item, taken at random

        def items(value, where):
            if not isinstance(value, origin):
                return where, hint, value
            wrongs = (item(x, f"{where}.{i}") for i, x in enumerate(value))
            return next((wrong for wrong in wrongs if wrong is not None), None)

        return items
    if origin is tuple and args:
        parts = [_check(a) for a in args]

        def fixed(value, where):
            if not isinstance(value, tuple) or len(value) != len(parts):
                return where, hint, value
            wrongs = (check(x, f"{where}.{i}") for i, (check, x) in enumerate(zip(parts, value, strict=True)))
            return next((wrong for wrong in wrongs if wrong is not None), None)

        return fixed
    if origin in (Union, types.UnionType):
        options = [_check(a) for a in args if a is not type(None)]
        optional = len(options) < len(args)

        def union(value, where):
            if optional and value is None:
                return None
            wrongs = []
            for option in options:
                if (wrong := option(value, where)) is None:
                    return None
                wrongs.append(wrong)
            # Of several options, the one of the value's own kind says best what is wrong.
            own = [w for w in wrongs if w[0] != where or (_is_array(w[1]) and isinstance(value, w[1].array_type))]
            return own[0] if len(own) == 1 else wrongs[0] if len(wrongs) == 1 else (where, hint, value)

        return union
    if isinstance(hint, TypeVar) and hint.__bound__ is not None:
        return _check(hint.__bound__)
    if hint in (int, float):
        fits = is_integer if hint is int else is_number
        return lambda value, where: None if fits(value) else (where, hint, value)
    return lambda value, where: None if is_bearable(value, hint, conf=TOWER) else (where, hint, value)


def _is_array(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, AbstractArray)


def _gathered(parameter: inspect.Parameter, hint: Any) -> Any:
    """`*args: X` arrives as a tuple of X, `**kwargs: X` as a dict."""
    gathered = {parameter.VAR_POSITIONAL: tuple[hint, ...], parameter.VAR_KEYWORD: dict[str, hint]}
    return gathered.get(parameter.kind, hint)


def _message(f: Callable, where: str, hint: Any, value: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_bindings()
    sizes = ", ".join(line.replace("torch.Size(", "").rstrip(")") for line in out.getvalue().splitlines()[1:])
    wanted = getattr(hint, "__name__", None) if inspect.isclass(hint) else str(hint)
    root, _, part = where.partition(".")
    what = f"argument `{where}`" if root != "return" else f"the result's `{part}`" if part else "the result"
    return (f"{f.__module__}.{f.__qualname__}: {what} should be {wanted}, got {_describe(value)}"
            + (f", where {sizes}" if sizes else ""))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # it stands in a weight's place
        return f"{type(value).__name__}{list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
