"""The records of planted bugs fit the code, and the replayer tells a bug that is found from one that survives."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import mutants
import plant
import pytest

BUGS = plant.records()


@cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("room", sorted({bug.room for bug in BUGS}))
def test_every_record_fits_the_code(room):
    bugs = [bug for bug in BUGS if bug.room == room]
    assert bugs
    wrong = []
    for bug in bugs:
        file, _, test = bug.where.partition("::")
        try:
            if plant.planted(bug, plant.ROOT) == (plant.ROOT / bug.file).read_text():
                wrong.append((bug.why, "changes nothing"))
        except (OSError, ValueError) as error:
            wrong.append((bug.why, str(error)))
        if not (plant.ROOT / file).is_file() or test not in functions(plant.ROOT / file):
            wrong.append((bug.why, f"there is no {bug.where}"))
    assert not wrong


def test_no_bug_is_planted_twice():
    assert len(BUGS) == len({bug[:-1] for bug in BUGS})


def test_mutants_are_programs_that_differ_and_what_is_listed_as_equivalent_is_one():
    files = [file.relative_to(plant.ROOT).as_posix() for file in sorted((plant.ROOT / "llama_fn/model").glob("*.py"))]
    found = [mutant for file in files for mutant in mutants.mutants(plant.ROOT, file)]
    assert len({mutant.text for mutant in found}) == len(found) > 200
    assert "llama_fn/model/norm.py rms_norm: upcast * inverse_rms -> (upcast / inverse_rms)" in map(str, found)
    listed = mutants.equivalent(plant.ROOT)
    files = {file for file, *_ in listed}
    assert listed <= {mutant[:4] for file in files for mutant in mutants.mutants(plant.ROOT, file)}


REPLAY = """
import plant
some = [bug for bug in plant.records() if (bug.room, bug.file[:15]) == ("model", "llama_fn/model/")]
some = [bug for bug in some if bug.test.startswith("test_model.py")]
harmless = some[0]._replace(instead=f"({some[0].words})", why="parentheses")
assert plant.survivors([*some[::len(some) // 4], harmless]) == [harmless]
"""


@pytest.mark.slow
def test_planted_bugs_are_found_and_what_changes_nothing_survives():
    done = subprocess.run([sys.executable, "-c", REPLAY], cwd=plant.ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SURVIVES") == 1
