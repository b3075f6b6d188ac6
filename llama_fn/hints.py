"""How a type hint becomes a check of a value, and what the error says; `typed` (`shapes.py`) uses both."""

import contextlib
import inspect
import io
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, Union

from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import AbstractArray, print_bindings
from torch import Tensor

from llama_fn.ranges import is_integer, is_number

TOWER = BeartypeConf(is_pep484_tower=True)  # an int is accepted as a float


def check_of(hint: Any) -> Callable[[Any, str], tuple[str, Any, Any] | None]:
    """The check of a hint: a function of a value and of its name.

    It returns None for a right value, and otherwise the name, the hint and the value of the part that is wrong.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_array(hint):
        return lambda value, where: None if isinstance(value, hint) else (where, hint, value)
    if inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        fields = [(name, check_of(h)) for name, h in typing.get_type_hints(hint, include_extras=True).items()]

        def named_tuple(value, where):
            if not isinstance(value, hint):
                return where, hint, value
            wrongs = (check(getattr(value, name), f"{where}.{name}") for name, check in fields)
            return next((wrong for wrong in wrongs if wrong is not None), None)

        return named_tuple
    if origin in (list, Sequence) or (origin is tuple and args[1:] == (Ellipsis,)):
        item = check_of(args[0])  # beartype would check only one item, chosen at random

        def items(value, where):
            if not isinstance(value, origin):
                return where, hint, value
            wrongs = (item(x, f"{where}.{i}") for i, x in enumerate(value))
            return next((wrong for wrong in wrongs if wrong is not None), None)

        return items
    if origin is tuple and args:
        parts = [check_of(a) for a in args]

        def fixed(value, where):
            if not isinstance(value, tuple) or len(value) != len(parts):
                return where, hint, value
            wrongs = (check(x, f"{where}.{i}") for i, (check, x) in enumerate(zip(parts, value, strict=True)))
            return next((wrong for wrong in wrongs if wrong is not None), None)

        return fixed
    if origin in (Union, types.UnionType):
        options = [check_of(a) for a in args if a is not type(None)]
        optional = len(options) < len(args)

        def union(value, where):
            if optional and value is None:
                return None
            wrongs = []
            for option in options:
                if (wrong := option(value, where)) is None:
                    return None
                wrongs.append(wrong)
            # The option of the value's own kind makes the best message.
            own = [w for w in wrongs if w[0] != where or (_is_array(w[1]) and isinstance(value, w[1].array_type))]
            return own[0] if len(own) == 1 else wrongs[0] if len(wrongs) == 1 else (where, hint, value)

        return union
    if isinstance(hint, TypeVar) and hint.__bound__ is not None:
        return check_of(hint.__bound__)
    if hint in (int, float):
        fits = is_integer if hint is int else is_number
        return lambda value, where: None if fits(value) else (where, hint, value)
    plain: Any = hint
    return lambda value, where: None if is_bearable(value, plain, conf=TOWER) else (where, hint, value)


def _is_array(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, AbstractArray)


def gathered(parameter: inspect.Parameter, hint: Any) -> Any:
    """The hint for the value of `*args: X`, a tuple of X, or of `**kwargs: X`, a dict."""
    gathered = {parameter.VAR_POSITIONAL: tuple[hint, ...], parameter.VAR_KEYWORD: dict[str, hint]}
    return gathered.get(parameter.kind, hint)


def message(f: Callable, where: str, hint: Any, value: Any) -> str:
    """The text of an `AxesError`: the function, the argument, what was expected, what was given, and known sizes."""
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
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # a value in a weight's place
        return f"{type(value).__name__}{list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
