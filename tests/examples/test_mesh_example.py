"""The example of a mesh, on two processes: it computes what one device computes, and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "mesh.py"


@pytest.mark.slow
def test_mesh_divides_a_model_over_two_processes():
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", EXAMPLE],
                          capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONWARNINGS": "error::UserWarning"})
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "mesh {'dp': 1, 'tp': 2}: a process has 480,528 of 959,760 numbers" in out
    assert "a process keeps (1, 3, 24, 144) and computes with (1, 3, 24, 144)" in out
    assert float(re.findall(r"gradient within (\S+) of one device's", out)[0]) < 1e-5
    assert re.findall(r"(\S+) over (\S+): (\S+) MB", out) == [("all-reduce", "tp", "7.81")]
    losses = [float(x) for x in re.findall(r"step \d+: loss ([\d.]+)", out)]
    assert losses[-1] < 0.5 * losses[0]
    assert "named Ada" in out.split("after: ")[1] and "named Ada" not in out.split("after: ")[0].split("before: ")[1]
