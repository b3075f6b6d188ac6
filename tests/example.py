"""The examples: their functions without their run, and their run without another process."""

import runpy
from pathlib import Path
from types import SimpleNamespace

EXAMPLES = Path(__file__).parent.parent / "examples"


def functions(name: str) -> SimpleNamespace:
    """What an example defines."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def run(name: str, capsys) -> str:
    """What an example prints. It runs in this process, where a warning is an error."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out
