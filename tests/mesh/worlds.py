"""Processes that stay: a world of 2 or 4 of them, joined by gloo, in which a test runs a function on every rank.

    results = world(2)(compute, *args)      # a list with each rank's result of compute(*args)

`compute` is a function at the top of a module of the tests. It runs with one thread. What it raises is raised here,
with the rank's traceback.
"""

import functools
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What all processes need is imported once, in one from which they are forked.
IMPORTED = ["torch.testing", "torch.distributed.tensor", "hypothesis", "pytest", "jaxtyping", "beartype", "einops"]
TIMEOUT = 480  # seconds for one call; a rank that waits for a dead one would wait for ever


def serve(rank: int, size: int, store: str, paths: list[str], pipe: Any) -> None:
    """Join the world, then run what comes through the pipe until it closes."""
    sys.path[:] = paths
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            module, name, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


@functools.cache
def world(size: int) -> Callable[..., list[Any]]:
    """A function that runs `compute(*args)` on every rank of a world of so many processes, started once."""
    context, store = mp.get_context("forkserver"), Path(tempfile.mkdtemp()) / "store"
    context.set_forkserver_preload(IMPORTED)
    pipes = []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(rank, size, str(store), sys.path, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)

    def run(compute: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send((compute.__module__, compute.__name__, args, kwargs))
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} of {size} gave no answer to {compute.__name__} in {TIMEOUT} s")
            answers.append(pipe.recv())
        failed = [f"rank {rank} of {size}:\n{text}" for rank, (right, text) in enumerate(answers) if not right]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    return run
