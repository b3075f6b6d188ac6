"""The house: who may import whom, how long the textbook is, and that every table of kernels ends in the definition.

`python tests/test_architecture.py` prints the lines of each file of `model/`, and how many of them are mathematics.
"""

import ast
import graphlib
import tomllib
from pathlib import Path

import grimp
import pytest
import torch
from hypothesis import given
from importlinter.cli import lint_imports
from strategies import keys

import llama_fn as lf
from llama_fn.model import attention, linear
from llama_fn.ops import attend as attends
from llama_fn.ops import linear as linears

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llama_fn"


def lines(folder: Path) -> dict[str, int]:
    return {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in folder.rglob("*.py")}


def mathematics(source: str) -> int:
    """The lines that compute: statements in functions, and the fields of trees, each with its axes.

    Imports, signatures, docstrings, comments and blank lines do not count, nor do errors and what leads to them alone:
    functions whose names begin with "check", `assert`, and an `if` that raises and does nothing else.
    """
    counted: set[int] = set()

    def visit(body: list[ast.stmt], computes: bool) -> None:
        for statement in body:
            inner = [part for name in ("body", "orelse") for part in getattr(statement, name, [])]
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                if not statement.name.lstrip("_").startswith("check"):
                    visit(inner, True)
            elif isinstance(statement, ast.If) and inner and all(isinstance(part, ast.Raise) for part in inner):
                continue
            elif computes and not isinstance(statement, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
                docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                last = inner[0].lineno - 1 if inner else statement.end_lineno or statement.lineno
                counted.update(() if docstring else range(statement.lineno, last + 1))
                visit(inner, True)

    visit(ast.parse(source).body, False)
    written = source.splitlines()
    return sum(bool(text := written[number - 1].strip()) and not text.startswith("#") for number in counted)


def signatures(source: str) -> int:
    """The lines of signatures, where the axes stand."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return sum(function.body[0].lineno - function.lineno for function in functions)


def table() -> str:
    sources = {path.name: path.read_text() for path in sorted((PACKAGE / "model").glob("*.py"))}
    rows = [(name, len(source.splitlines()), mathematics(source), signatures(source))
            for name, source in sources.items()]
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    return "\n".join(["| file of `model/` | lines | of them mathematics | signatures |", "|---|---|---|---|",
                      *(f"| `{name}` | {count} | {computing} | {axes} |" for name, count, computing, axes in rows)])


def test_a_room_knows_the_rooms_below_it_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


def arrows() -> dict[str, set[str]]:
    """Which rooms a room imports; a file beside the rooms counts as one."""
    graph = grimp.build_graph("llama_fn", cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules - {"llama_fn", "llama_fn.__main__"}:
        others = {name.split(".")[1] for name in graph.find_modules_directly_imported_by(module) if "." in name}
        found.setdefault(module.split(".")[1], set()).update(others - {module.split(".")[1]})
    return found


def test_rooms_import_each_other_in_no_circle():
    found = arrows()
    assert {"model", "ops", "shapes"} <= found["transforms"]
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(found | {"ops": found["ops"] | {"model"}}).prepare()


def test_every_room_has_a_readme():
    rooms = [room for room in PACKAGE.iterdir() if (room / "__init__.py").exists()]
    assert [room.name for room in rooms if not (room / "README.md").exists()] == []


def test_the_readme_shows_the_floors():
    """Each floor of the contract is a line of the picture, in the same order."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    picture = (ROOT / "README.md").read_text().split("## The house")[1].split("```")[1].strip().splitlines()
    floors = [floor.replace(" | ", "  ") for floor in contract["layers"]]
    assert [line[:len(floor)] for line, floor in zip(picture, floors, strict=True)] == floors


def test_the_mathematics_is_short():
    model = lines(PACKAGE / "model")
    assert sum(model.values()) <= 700 and max(model.values()) <= 130, model


def test_lines_that_compute_are_counted_as_mathematics():
    assert mathematics("""
import math
@typed
def square(x, unused=
           1):
    '''A docstring
    of two lines.'''
    if x < 0:
        raise ValueError
    assert x
    # a comment
    y = (x
         * x)  # another
    for _ in range(3):

        y = y + 1
    return y
def check_x(x):
    return x
class Pair(NamedTuple):
    '''Two.'''
    a: int
    b: int
""") == 7
    assert mathematics((PACKAGE / "model" / "checks.py").read_text()) == 0


def test_no_room_is_most_of_the_house():
    rooms = {room.name: sum(lines(room).values()) for room in PACKAGE.iterdir() if room.is_dir()}
    assert max(rooms.values()) <= 0.3 * sum(lines(PACKAGE).values()), rooms


@given(keys())
def test_what_no_row_of_a_table_accepts_is_the_definitions(key):
    weight, x = lf.random.normal(key, (5, 7), torch.float64), lf.random.normal(key, (3, 7), torch.float64)
    queries = lf.random.normal(key, (2, 3, 4, 6), torch.float64)
    keys, values = lf.random.normal(key, (2, 2, 9, 6), torch.float64)
    positions = torch.tensor([0, 2, 5, 8])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears, "TABLE", ())
        patch.setattr(attends, "TABLE", ())
        assert linears.choose(weight, x, linear.written_out) is linear.written_out
        seen = attends.attend(attention.written_out, queries, keys, values, positions)
    assert torch.allclose(seen, attention.written_out(queries, keys, values, positions), atol=1e-12)
    for accepted in attends.TABLE:
        if accepted.accepts(queries, keys, values, positions):
            assert torch.allclose(accepted.compute(queries, keys, values, positions), seen, atol=1e-12)
    exact = linear.written_out(weight, x)
    for accepted in linears.TABLE:
        if accepted.accepts(weight, x):
            assert torch.allclose(accepted.compute(weight, x), exact, atol=1e-12)


if __name__ == "__main__":
    print(table())
