"""Small changes of a file, made by the rules below: what share of them do the tests of its room find?

Annotations, docstrings, error messages and what only a type checker reads are left alone. Of what survives,
`equivalent.toml` lists what computes the same by another road, with the reason.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OTHERS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
          ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
          ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
          ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And}
CASTS = {"to", "float", "long", "contiguous", "detach", "clone"}
TYPES = {"TypeVar", "TYPE_CHECKING"}
UNORDERED = {"promote_types", "isinstance", "min", "max"}  # to swap their arguments is nothing, or Python's own error


class Mutant(NamedTuple):
    """A file in which `old`, within the function `where`, became `new`."""

    file: str
    where: str
    old: str
    new: str
    text: str

    def __str__(self) -> str:
        return f"{self.file} {self.where}: {self.old} -> {self.new}"


def mutants(root: Path, file: str) -> list[Mutant]:
    """Every mutant of a file, in the order of its functions."""
    source = (root / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for where, node, new in _changes(ast.parse(source), ""):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        old, text = source[begin:end].decode(), source[:begin].decode() + new + source[end:].decode()
        found.setdefault(ast.dump(ast.parse(text)), Mutant(file, where, " ".join(old.split()), new, text))
    return list(found.values())


def equivalent(root: Path) -> set[tuple[str, str, str, str]]:
    """The mutants that compute the same: file, function, old and new."""
    listed = tomllib.loads((root / "tests/equivalent.toml").read_text())["mutant"]
    return {(each["file"], each["where"], each["old"], each["new"]) for each in listed}


def _changes(node: ast.AST, where: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Where, which part of the source, and what comes in its place."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        where = f"{where}.{node.name}" if where else node.name
    yield from ((where, part, new) for part, new in _of_one(node))
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_left_alone(child):
                yield from _changes(child, where)


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg == "strict"):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    head = node.test if isinstance(node, ast.If) else node.value if isinstance(node, ast.Assign) else None
    return any(isinstance(part, ast.Name) and part.id in TYPES for part in ast.walk(head)) if head else False


def _of_one(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    match node:
        case ast.BinOp(left, op, right) if type(op) in OTHERS:
            yield node, _text(ast.BinOp(left, OTHERS[type(op)](), right))
        case ast.BoolOp(op, values):
            yield node, _text(ast.BoolOp(OTHERS[type(op)](), values))
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield node, _text(operand)
        case ast.Compare(left, ops, right):
            for i, op in enumerate(ops):
                yield node, _text(ast.Compare(left, [*ops[:i], OTHERS[type(op)](), *ops[i + 1:]], right))
        case ast.Constant(bool() as value):
            yield node, str(not value)
        case ast.Constant(int() | float() as value):
            yield node, "0" if value == 1 else str(value + 1)
        case ast.Call(ast.Attribute(value, name), _, _) if name in CASTS:
            yield node, _text(value)
    if isinstance(node, ast.Call) and _may_be_swapped(node):
        yield node, _text(ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords))
    if isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield node.test, f"(not {_text(node.test)})"
    known = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)} if isinstance(
        node, ast.FunctionDef) else set()
    for statement in [*_list(node, "body"), *_list(node, "orelse")]:
        match statement:
            case ast.Assign([target], _) if names(target) <= known or not names(target):
                yield statement, "pass"  # else the name would be missing, which anybody finds
            case ast.AugAssign() | ast.Raise() | ast.Expr(ast.Call()):
                yield statement, "pass"
        known |= names(statement)


def _may_be_swapped(call: ast.Call) -> bool:
    """Whether its first two arguments may stand for each other: not a constant and what is none."""
    kinds = [type(each) for each in call.args[:2]]
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return len(kinds) == 2 and name not in UNORDERED and ast.Starred not in kinds and (
        kinds[0] == kinds[1] or not {ast.Constant, ast.Tuple, ast.UnaryOp} & {*kinds})


def names(node: ast.AST) -> set[str]:
    """The names that are bound in it."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}


def _list(node: ast.AST, name: str) -> list:
    value = getattr(node, name, [])
    return value if isinstance(value, list) else []


def _text(node: ast.AST) -> str:
    return f"({ast.unparse(ast.fix_missing_locations(node))})"
