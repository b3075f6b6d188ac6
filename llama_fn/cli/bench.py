"""`llama-fn bench`: what the axes' checks cost, and how fast a model decodes, measured here and now."""

import json
import os
import statistics
import subprocess
import sys
import time

import torch

from llama_fn.checkpoint.load import load
from llama_fn.model.cache import init_cache
from llama_fn.model.transformer import forward


def bench(*, model: str = "stories", rounds: int = 5, calls: int = 200) -> None:
    """Time one eager decode step with and without the checks of `typed`, in turn, each in a process of its own.

    Args:
        model: The embedded model "stories", or the folder of a model.
        rounds: Pairs of processes.
        calls: Steps a process, of which it gives the median.
    """
    times: dict[str, list[float]] = {"1": [], "0": []}
    for _ in range(rounds):
        for checks, seen in times.items():
            program = f"from llama_fn.cli.bench import step_time; print(step_time({json.dumps(model)}, {calls}))"
            done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "LLAMA_FN_TYPED": checks},
                                  check=True, stdout=subprocess.PIPE, text=True)
            seen.append(1e6 * float(done.stdout))
    checked, unchecked = (statistics.median(seen) for seen in times.values())
    print(f"one decode step, eager, batch 1, {torch.get_num_threads()} threads, median of {rounds} x {calls}:")
    print(f"with checks     {checked:7.0f} us  {1e6 / checked:6.0f} tokens a second   {_spread(times['1'])}")
    print(f"without         {unchecked:7.0f} us  {1e6 / unchecked:6.0f} tokens a second   {_spread(times['0'])}")
    print(f"the checks cost {checked - unchecked:7.0f} us, {checked / unchecked - 1:.0%}")


def step_time(model: str, calls: int) -> float:
    """The median seconds of a decode step of one row."""
    params, _ = load(model)
    cache = init_cache(params.config, max_len=params.config.max_seq_len, dtype=params.norm.dtype)
    tokens, times = torch.tensor([1]), []
    for _ in range(calls):
        begun = time.perf_counter()
        forward(params, tokens, cache)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _spread(times: list[float]) -> str:
    return f"({min(times):.0f} to {max(times):.0f})"
