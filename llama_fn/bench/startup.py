"""The measurement of `llama-fn bench startup`: how long a new process takes to its first token."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from llama_fn.bench.timing import Figures
from llama_fn.bench.work import DTYPES, Work, filled, weights
from llama_fn.compiled.layers import jit_layers
from llama_fn.model.transformer import forward


def startup(work: Work, rounds: int) -> Figures:
    """Seconds to the first token of a new process: with an empty compile cache, with a filled one, and eager."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, compiled in (("compiled, nothing cached", True), ("compiled, cached", True), ("eager", False)):
            seconds = seconds_to_first_token(work, compiled, Path(folder))
            figures[f"{name}: first token, s"] = f"{seconds:.1f}"
    return figures | {"(without the making of random weights)": ""}


def seconds_to_first_token(work: Work, compiled: bool, cache: Path) -> float:
    """From the start of a new process to its first token, without the time that it takes to make random weights.

    The process keeps its compile cache in the folder `cache`.
    """
    program = (f"from {__name__} import first_token; from {Work.__module__} import Work; "
               f"print(*first_token(Work(*{tuple(work)!r}), {compiled}))")
    begin = time.time()
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(cache)})
    end, making = map(float, done.stdout.split())
    return end - begin - making


def first_token(work: Work, compiled: bool) -> tuple[float, float]:
    """Compute one token in this process: the time at which it is there, and how many seconds the weights took."""
    begin = time.perf_counter()
    params = weights(work)
    making = time.perf_counter() - begin
    cache = filled(params.config, work, DTYPES[work.dtype])
    run = jit_layers() if compiled else forward
    with torch.no_grad():
        logits, _ = run(params, torch.zeros((work.batch, 1), dtype=torch.int64, device=params.norm.device), cache)
        logits.argmax(-1).tolist()
    return time.time(), making
