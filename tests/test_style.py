"""The rules of style, those of docstrings among them, are kept: ruff's, as `pyproject.toml` chooses them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def check(*where: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *where],
                          cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_file_keeps_the_rules():
    done = check(".")
    assert done.returncode == 0, done.stdout


def test_a_public_function_without_a_docstring_is_found(tmp_path):
    (tmp_path / "new.py").write_text('"""A file."""\n\n\ndef public(x: int) -> int:\n    return x\n')
    done = check("--config", ROOT / "pyproject.toml", tmp_path)
    assert done.returncode == 1 and "D103" in done.stdout
