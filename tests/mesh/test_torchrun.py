"""`torchrun ... -m llama_fn`: one process speaks, all stop, and a run comes back. Each test starts processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from program import COMMAND

import llama_fn as lf

TESTS = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}


def ended(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, "-m", "llama_fn", *args], capture_output=True, text=True, check=False, env=ENV,
                          timeout=300, **options)


def said(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("llama-fn: ")]


@pytest.mark.slow
def test_an_error_is_one_line_of_the_first_process_with_status_2(tmp_path):
    done = ended("train", "--out", str(tmp_path / "run"), "--mesh", "dp=2", "--batch", "3")
    assert said(done.stderr) == ["llama-fn: a batch of 3 rows cannot be divided over 2 devices; choose a multiple of 2"]
    assert "exitcode  : 2 " in done.stderr and done.stdout == "" and not (tmp_path / "run").exists()
    done = ended("generate", "-", "--mesh", "tp=2", input=" \n")  # the first process alone reads the standard input
    assert said(done.stderr) == ["llama-fn: the prompt is empty: standard input holds no text"] and done.stdout == ""


@pytest.mark.slow
def test_greedy_text_is_that_of_one_process():
    request = ["generate", "Once upon", "-n", "30", "--greedy"]
    alone = subprocess.run([*COMMAND, *request], capture_output=True, text=True, check=True, env=ENV)
    done = ended(*request, "--mesh", "tp=2")
    assert (done.returncode, done.stdout) == (0, alone.stdout), done.stderr


@pytest.mark.slow
def test_an_adapter_that_is_trained_by_parts_is_written_whole(tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time there was a cat.\n\n" * 8)
    done = ended("finetune", "stories", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"), "--rank", "2",
                 "--steps", "2", "--batch", "2", "--mesh", "tp=2")
    assert (done.returncode, said(done.stderr)) == (0, []), done.stderr
    params = lf.load("stories").params
    trained = lf.lora.load(tmp_path / "run", params)
    assert any(b.any() for _, b in trained.matrices.values())
    assert torch.isfinite(lf.loss(lf.lora.apply(params, trained), torch.arange(8)))


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_stops_all_and_the_run_goes_on_compiled(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat.\n" * 90)
    run = ["train", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"), "--mesh", "dp=2", "--dim", "16",
           "--n-layers", "1", "--n-heads", "4", "--n-kv-heads", "2", "--hidden-dim", "24", "--context", "24", "--batch",
           "4", "--vocab-size", "288", "--peak-tflops", "0.1", "--evaluate-every", "20", "--warmup", "5"]
    script = [*TORCHRUN, "-m", "llama_fn", *run, "--steps", "100000"]
    with subprocess.Popen(script, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        until = time.monotonic() + 240
        while not [*(tmp_path / "run").glob("snapshots/step-*")] and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=100)
    assert text.count("stops after this step") == 1 and text.count("stopped; go on with --resume") == 1
    assert said(text) == []
    step = max(int(path.name[5:]) for path in (tmp_path / "run").glob("snapshots/step-*"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert f'"step": {step},' in lines[-1] and not (tmp_path / "run" / "lock").exists()
    done = ended(*run, "--steps", str(step + 1), "--resume")
    assert done.returncode == 0 and (tmp_path / "run" / "consolidated.00.pth").is_file(), done.stderr


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_comes_back():
    """The script of twenty kills in short, with the seed of a kill inside saving."""
    done = subprocess.run([sys.executable, TESTS / "kill_ranks.py", "1", "2"], capture_output=True, text=True,
                          check=False, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inside saving" in done.stdout and "said: rank" in done.stdout
