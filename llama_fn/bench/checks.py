"""The measurement of `llama-fn bench checks`: what the checks of axes cost an eager decode step."""

import os
import statistics
import subprocess
import sys
import time

import torch

from llama_fn.bench.timing import Figures
from llama_fn.checkpoint.load import load
from llama_fn.model.cache import init_cache
from llama_fn.model.transformer import forward


def checks(rounds: int, calls: int = 200) -> Figures:
    """Microseconds of an eager decode step with and without checks, in turn, each in a process of its own."""
    times: dict[str, list[float]] = {"1": [], "0": []}
    for _ in range(rounds):
        for switch, seen in times.items():
            program = f"from {__name__} import step_time; print(step_time({calls}))"
            done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "LLAMA_FN_TYPED": switch},
                                  check=True, stdout=subprocess.PIPE, text=True)
            seen.append(1e6 * float(done.stdout))
    checked, unchecked = (statistics.median(seen) for seen in times.values())
    spread = {switch: f"({min(seen):.0f} to {max(seen):.0f})" for switch, seen in times.items()}
    return {"a decode step with checks, us": f"{checked:.0f} {spread['1']}",
            "without, us": f"{unchecked:.0f} {spread['0']}",
            "the checks cost": f"{checked - unchecked:.0f} us, {checked / unchecked - 1:.0%}"}


def step_time(calls: int) -> float:
    """The median seconds of `calls` decode steps of one row, with the shipped model."""
    params, _ = load("stories")
    cache = init_cache(params.config, max_len=params.config.max_seq_len, dtype=params.norm.dtype)
    tokens, times = torch.tensor([1]), []
    for _ in range(calls):
        begin = time.perf_counter()
        forward(params, tokens, cache)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
