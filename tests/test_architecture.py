"""The house: who may import whom, how long the textbook is, and that every table of kernels ends in the definition."""

import tomllib
from pathlib import Path

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


def test_a_room_knows_the_rooms_below_it_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


def test_the_readme_shows_the_floors():
    """Each floor of the contract is a line of the picture, in the same order."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    picture = (ROOT / "README.md").read_text().split("## The house")[1].split("```")[1].strip().splitlines()
    floors = [floor.replace(" | ", "  ") for floor in contract["layers"]]
    assert [line[:len(floor)] for line, floor in zip(picture, floors, strict=True)] == floors


def test_the_mathematics_is_short():
    model = lines(PACKAGE / "model")
    assert sum(model.values()) <= 700 and max(model.values()) <= 130, model


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
        assert linears.chosen(weight, x, linear.written_out) is linear.written_out
        seen = attends.attend(attention.written_out, queries, keys, values, positions)
    assert torch.allclose(seen, attention.written_out(queries, keys, values, positions), atol=1e-12)
    for accepted in attends.TABLE:
        if accepted.accepts(queries, keys, values, positions):
            assert torch.allclose(accepted.compute(queries, keys, values, positions), seen, atol=1e-12)
    exact = linear.written_out(weight, x)
    for accepted in linears.TABLE:
        if accepted.accepts(weight, x):
            assert torch.allclose(accepted.compute(weight, x), exact, atol=1e-12)
