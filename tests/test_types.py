"""What type checkers say to a user: nothing about right code, in their strictest modes, and something about wrong code.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FILES = ("users_script.py", "users_mistakes.py", "readme.py")

pytestmark = pytest.mark.slow


def installed_here() -> bool:
    """Whether this tree is installed in the environment (editable), so that a type checker has to find it there."""
    try:
        told = importlib.metadata.distribution("llama_fn").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(told) and json.loads(told)["url"] == ROOT.as_uri()


def pyright(folder: Path) -> dict[str, set[int]]:
    """The lines with errors of each file."""
    settings = {"typeCheckingMode": "strict", "include": ["."], "extraPaths": [] if installed_here() else [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run([sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
                          cwd=folder, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert told["summary"]["filesAnalyzed"] == len(FILES)
    print(done.stdout)
    return lines(*((Path(x["file"]).name, x["range"]["start"]["line"] + 1) for x in told["generalDiagnostics"]))


def mypy(folder: Path) -> dict[str, set[int]]:
    """The lines with errors of each file."""
    environment = os.environ | ({} if installed_here() else {"MYPYPATH": str(ROOT)})
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary",
                           "--cache-dir", str(folder / "cache"), *FILES],
                          cwd=folder, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode < 2 and not done.stderr
    return lines(*((file, int(line)) for file, line in re.findall(r"^(\S+?):(\d+): error", done.stdout, re.MULTILINE)))


def lines(*errors: tuple[str, int]) -> dict[str, set[int]]:
    return {file: {line for name, line in errors if name == file} for file in FILES}


@pytest.fixture(scope="module", params=[pyright, mypy])
def errors(request, tmp_path_factory) -> dict[str, set[int]]:
    """The lines of each file in which a checker finds an error."""
    folder = tmp_path_factory.mktemp("types")
    for file in FILES[:-1]:
        shutil.copy(TESTS / file, folder)
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (folder / FILES[-1]).write_text(block)
    return request.param(folder)


def test_a_users_script_has_no_errors(errors):
    assert not errors["users_script.py"]


def test_the_readmes_first_block_has_no_errors(errors):
    assert not errors["readme.py"]


def test_every_mistake_is_shown(errors):
    source = (TESTS / "users_mistakes.py").read_text().splitlines()
    assert errors["users_mistakes.py"] == {i for i, line in enumerate(source, 1) if line.endswith("# wrong")}


def test_the_package_itself_has_no_errors():
    done = subprocess.run([sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
                          cwd=ROOT, capture_output=True, text=True)  # settings: pyproject.toml
    told = json.loads(done.stdout)
    assert told["summary"]["filesAnalyzed"] == len([*(ROOT / "llama_fn").rglob("*.py")])
    assert [f"{x['file']}:{x['range']['start']['line'] + 1}: {x['message']}" for x in told["generalDiagnostics"]] == []


def test_the_script_uses_every_public_name():
    import llama_fn as lf

    used = set(re.findall(r"\blf\.(\w+)", (TESTS / "users_script.py").read_text()))
    assert set(lf.__all__) <= used
