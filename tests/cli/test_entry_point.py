"""The program `llama-fn` before its package is imported."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# This stands in for torch, whose import takes a second or more.
SLOW_TORCH = """
import sys, time
print("importing", flush=True)
time.sleep(60)
"""


def test_ctrl_c_during_the_import_of_torch_ends_quietly_with_status_130(tmp_path):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    module, function = re.search(r'^llama-fn = "(.*):(.*)"', (REPOSITORY / "pyproject.toml").read_text(), re.M).groups()
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    with subprocess.Popen([sys.executable, "-c", f"from {module} import {function}; {function}()", "--version"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": path}) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
