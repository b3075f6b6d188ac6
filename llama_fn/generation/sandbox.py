"""Render a Jinja template from an untrusted file within bounds of time and memory.

Only this file imports jinja2. Jinja's own sandbox keeps a template from Python's internals. Here its time and memory
are bounded, too. The bound counts work and reads no clock, so that the same template and values always give the same
text or the same error. Operations that make a large value from a small one in a single step (``*`` on text, ``center``,
``format``) are refused; chat templates do not need them.
"""

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LONGEST = 1 << 17  # characters of a template; templates for tools have about 20,000
LARGEST = 1 << 20  # characters and items of a value, and characters of the rendered text
WORK = 1 << 23  # how much all operations together may read, in items or in 64 characters; it takes 5 s at most
FILTERS = ("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items",
           "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select",
           "selectattr", "sort", "string", "title", "trim", "unique", "upper")
METHODS = ("capitalize", "count", "cycle", "endswith", "find", "get", "index", "isalnum", "isalpha", "isdigit", "items",
           "join", "keys", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
           "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper", "values")


def renderer(template: str) -> Callable[..., str]:
    """A function that renders a template with the variables that it is given.

    Raises `ValueError` for a template that is too long or wrong. The function does so for an error in rendering.
    """
    if len(template) > LONGEST:
        raise ValueError(f"the chat template has {len(template)} characters, more than {LONGEST}")
    environment = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.step = 64 + len(template) // 16  # the work that one pass of a loop, or one call, counts as
    parsed = _with_named_errors(environment.from_string)(template)

    def render(**variables: Any) -> str:
        environment.left = WORK
        pieces, length = [], 0
        for piece in parsed.generate(**variables):
            length += len(piece)
            if length > LARGEST:
                raise TemplateError(f"its text has more than {LARGEST} characters")
            pieces.append(piece)
        return "".join(pieces)

    return _with_named_errors(render)


def _with_named_errors(f: Callable) -> Callable:
    """The function `f` with every error turned into a `ValueError` that names the template.

    A template can raise any error, by a division by zero or a call of itself.
    """
    @functools.wraps(f)
    def called(*args: Any, **variables: Any) -> Any:
        try:
            return f(*args, **variables)
        except Exception as error:
            raise ValueError(f"the chat template cannot be rendered: {error or type(error).__name__}") from None
    return called


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also measures every value when it is made. ``left`` is the work that may still be done."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    step, left = 0, WORK

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=self.fits)
        self.filters = {name: self.filters[name] for name in FILTERS} | {
            "tojson": _to_json, "replace": pass_context(lambda _, text, *how: self.replaced(str(text), *how)),
            "join": pass_context(lambda _, items, glue="", attribute=None: self.joined(glue, items, attribute)),
            "(fits)": pass_context(lambda _, value: self.fits(value)),
            "(iterated)": pass_context(lambda _, items: self.iterated(items))}
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": Namespace,
                        "raise_exception": _raise, "strftime_now": _now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Measured().visit(super()._parse(source, name, filename))

    def spend(self, work: int) -> None:
        """Count work. Raises `TemplateError` when it is too much."""
        self.left -= work
        if self.left < 0:
            raise TemplateError("it does not come to an end: its loops and calls are too many")

    def fits(self, value: Any) -> Any:
        """The value. Raises `TemplateError` if it is too large."""
        items, characters, stack = 0, 0, [value]
        while stack:
            x = stack.pop()
            if isinstance(x, str):
                characters += len(x)
            elif isinstance(x, list | tuple):
                stack.extend(x)
            elif isinstance(x, dict):
                stack.extend(y for pair in x.items() for y in pair)
            elif isinstance(x, int) and x.bit_length() > 64:
                raise TemplateError("it counts beyond 64 bits")
            items += 1
            if items + characters + len(stack) > LARGEST:
                raise TemplateError(f"it makes a value of more than {LARGEST} characters or items")
        self.spend(items + characters // 64)
        return value

    def iterated(self, items: Any) -> list:
        """The items of a loop, whose passes are counted as work."""
        items = self.fits(list(items))
        self.spend(self.step * (1 + len(items)))
        return items

    def replaced(self, text: str, old: str, new: str, count: int = -1) -> str:
        """Do what ``str.replace`` does. Raises `TemplateError` before the result would be too large."""
        found = text.count(old) if count is None or count < 0 else count
        if len(text) + found * len(new) > 2 * LARGEST:
            raise TemplateError(f"it makes a text of more than {LARGEST} characters")
        return text.replace(old, new, -1 if count is None else count)

    def joined(self, glue: str, items: Any, attribute: str | int | None = None) -> str:
        """Do what ``str.join`` does. Raises `TemplateError` before the result would be too large."""
        parts = [str(x if attribute is None else self.getitem(x, attribute)) for x in self.fits(list(items))]
        if sum(map(len, parts)) + len(parts) * len(str(glue)) > 2 * LARGEST:
            raise TemplateError(f"it makes a text of more than {LARGEST} characters")
        return str(glue).join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator to two values: ``+`` to any, the others to numbers alone."""
        if operator == "**" or (operator != "+" and not (isinstance(left, int | float) and
                                                         isinstance(right, int | float))):
            raise TemplateError(f"it applies {operator} to a {type(left).__name__} and a {type(right).__name__}")
        return self.fits(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute. Of the methods it may call those of `METHODS`."""
        known = attr in METHODS or not callable(value) or isinstance(obj, Namespace)
        return known and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No function, since ``format`` is refused."""
        return None

    def call(self, context: Any, f: Any, *args: Any, **named: Any) -> Any:
        """Call a function with arguments and a result that are not too large."""
        self.spend(self.step)
        text, name = getattr(f, "__self__", None), getattr(f, "__name__", None)
        self.fits([text if isinstance(text, str) else "", *args, *named.values()])
        if isinstance(text, str) and name in ("replace", "join"):
            f = functools.partial(self.replaced if name == "replace" else self.joined, text)
        return self.fits(super().call(context, f, *args, **named))


class _Measured(NodeTransformer):
    """Change a template so that it measures what it iterates over, assigns, or filters. ``~`` becomes ``+``."""

    def generic_visit(self, node: nodes.Node, *args: Any, **named: Any) -> nodes.Node:
        """The node, changed."""
        super().generic_visit(node, *args, **named)
        if isinstance(node, nodes.Concat):
            texts: list[nodes.Expr] = [_filter(x, "string") for x in node.nodes]
            whole = texts[0]
            for text in texts[1:]:
                whole = nodes.Add(whole, text, lineno=node.lineno)
            return whole
        if isinstance(node, nodes.For):
            if node.recursive:
                raise TemplateError("it has a recursive loop, which is not supported")
            node.iter = _filter(node.iter, "(iterated)")
        if isinstance(node, nodes.Filter) and node.node is not None:
            node.node = _filter(node.node, "(fits)")
        if isinstance(node, nodes.Assign):
            node.node = _filter(node.node, "(fits)")
        if isinstance(node, nodes.AssignBlock):
            node.filter = _filter(node.filter, "(fits)", node.lineno)
        if isinstance(node, nodes.With):
            node.values = [_filter(x, "(fits)") for x in node.values]
        return node


def _filter(node: Any, name: str, line: int = 0) -> nodes.Filter:  # jinja annotates a loop's items as any node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno if node else line)


class _Generation(Extension):
    """The tag ``{% generation %}``, with which transformers marks answers. It does not change the text."""

    tags = frozenset(("generation",))  # pyright: ignore[reportAssignmentType]  jinja only reads it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The contents of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:
    """JSON as transformers writes it. Jinja's own filter also escapes HTML."""
    if indent is not None and not 0 <= indent <= 8:
        raise TemplateError(f"it indents JSON by {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(format: str) -> str:
    if len(format) > 100:
        raise TemplateError("it has a date's format of more than 100 characters")
    return datetime.now().strftime(format)
