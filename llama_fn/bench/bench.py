"""`llama-fn bench`: what the project claims of its speed, measured here and now."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Literal

import torch
import tyro

from llama_fn.bench.device import device_of
from llama_fn.bench.speed import PEERS, SPEED, Work, check
from llama_fn.bench.transforms import TRANSFORMS
from llama_fn.checkpoint.load import load
from llama_fn.memory import keep_memory
from llama_fn.model.cache import init_cache
from llama_fn.model.transformer import forward

What = Literal["checks", "transforms", "decode", "prefill", "train", "startup"]


def bench(what: tyro.conf.Positional[What] = "checks", *, work: Work = Work(), only: tuple[str, ...] = (),  # noqa: B008
          rounds: int = 11, json_out: bool = False) -> None:
    """Time one kind of work against another, in turn and in one run, and print medians, with their quartiles.

    A ratio is that of the rounds' own ratios; where half of them lie too far apart to mean one, it says so.

    Args:
        what: "checks": one eager decode step of the stories' model with and without the checks of `typed`.
            "transforms": per-sample gradients and norms, `vmap` beside a batch, adapters, recomputation, speculation.
            "decode", "prefill", "train": a step, beside the speed of this machine's memory or matrix products.
            "startup": the seconds of a new process to its first token.
        only: Some of the transforms' measurements alone.
        rounds: How often each work is timed.
        json_out: Print the figures as JSON.
    """
    place = device_of(work.device)
    gpu = f", {torch.cuda.get_device_name(place)}" if what in SPEED and place.type == "cuda" else ""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}{gpu}"
    if unknown := [name for name in only if name not in TRANSFORMS]:
        raise ValueError(f"bench: there is no measurement {unknown[0]!r}, only {', '.join(TRANSFORMS)}")
    if rounds < 3:
        raise ValueError(f"bench: quartiles need 3 rounds or more, got {rounds}")
    known = {"decode": PEERS, "prefill": PEERS, "train": ("module",)}.get(what, ())
    if not {*work.compare} <= {*known}:
        raise ValueError(f"bench: there is nothing to compare {what} with; leave --compare out")
    if what != "checks":
        keep_memory()
    if what == "checks":
        figures = {"checks": checks(rounds)}
    elif what == "transforms":
        figures = {name: measure(rounds) for name, measure in TRANSFORMS.items() if not only or name in only}
    else:
        check(work)
        title = f"{what}: {work.shape}, {work.dtype}, {work.batch} x {work.context}, {work.max_len} slots"
        figures = {title: SPEED[what](work, rounds)}
    if json_out:
        print(json.dumps({"machine": machine, **figures}, indent=1))
        return
    print(machine)
    for name, lines in figures.items():
        print(f"\n{name}")
        for what_, figure in lines.items():
            print(f"  {what_:58} {figure}")


def checks(rounds: int, calls: int = 200) -> dict[str, str]:
    """One eager decode step with and without checks, in turn, each in a process of its own."""
    times: dict[str, list[float]] = {"1": [], "0": []}
    for _ in range(rounds):
        for switch, seen in times.items():
            program = f"from llama_fn.bench.bench import step_time; print(step_time({calls}))"
            done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "LLAMA_FN_TYPED": switch},
                                  check=True, stdout=subprocess.PIPE, text=True)
            seen.append(1e6 * float(done.stdout))
    checked, unchecked = (statistics.median(seen) for seen in times.values())
    spread = {switch: f"({min(seen):.0f} to {max(seen):.0f})" for switch, seen in times.items()}
    return {"a decode step with checks, us": f"{checked:.0f} {spread['1']}",
            "without, us": f"{unchecked:.0f} {spread['0']}",
            "the checks cost": f"{checked - unchecked:.0f} us, {checked / unchecked - 1:.0%}"}


def step_time(calls: int) -> float:
    """The median seconds of a decode step of one row of the shipped model."""
    params, _ = load("stories")
    cache = init_cache(params.config, max_len=params.config.max_seq_len, dtype=params.norm.dtype)
    tokens, times = torch.tensor([1]), []
    for _ in range(calls):
        begun = time.perf_counter()
        forward(params, tokens, cache)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)
