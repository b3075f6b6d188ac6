"""What `kill_training.py` and `flip_training.py` show with larger counts, in short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("script, counts", [("kill_training.py", ("12",)), ("flip_training.py", ("24", "0", "21"))])
def test_killed_and_damaged_runs_lose_nothing_in_silence(script, counts):
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    done = subprocess.run([sys.executable, TESTS / script, *counts], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
