"""All measurements by their names, and the machine that they were taken on."""

import platform
from collections.abc import Collection
from typing import Literal

import torch

from llama_fn.bench.checks import checks
from llama_fn.bench.device import device_of
from llama_fn.bench.speed import PEERS, decode, prefill, train
from llama_fn.bench.startup import startup
from llama_fn.bench.timing import Figures
from llama_fn.bench.transforms import TRANSFORMS
from llama_fn.bench.work import Work, check
from llama_fn.memory import keep_memory

What = Literal["checks", "transforms", "decode", "prefill", "train", "startup"]
SPEED = {"decode": decode, "prefill": prefill, "train": train, "startup": startup}  # these take a `Work`


def measure(what: What, work: Work, only: Collection[str], rounds: int) -> dict[str, Figures]:
    """The figures of one kind of measurement, under a title for each table.

    `only` names the measurements to take of "transforms"; none means all. Raises `ValueError`, before anything is
    measured, for a measurement that does not exist and for a `work` that is not possible.
    """
    if unknown := [name for name in only if name not in TRANSFORMS]:
        raise ValueError(f"bench: there is no measurement {unknown[0]!r}, only {', '.join(TRANSFORMS)}")
    if rounds < 3:
        raise ValueError(f"bench: quartiles need 3 rounds or more, got {rounds}")
    peers = {"decode": {*PEERS}, "prefill": {*PEERS}, "train": {"module"}}.get(what, set())
    if not {*work.compare} <= peers:
        raise ValueError(f"bench: there is nothing to compare {what} with; leave --compare out")
    if what == "checks":
        return {"checks": checks(rounds)}
    keep_memory()
    if what == "transforms":
        return {name: taken(rounds) for name, taken in TRANSFORMS.items() if not only or name in only}
    check(work)
    title = f"{what}: {work.shape}, {work.dtype}, {work.batch} x {work.context}, {work.max_len} slots"
    return {title: SPEED[what](work, rounds)}


def machine(what: What, work: Work) -> str:
    """The processor, the number of threads and torch's version, and the GPU where the work runs on one."""
    device = device_of(work.device)
    gpu = f", {torch.cuda.get_device_name(device)}" if what in SPEED and device.type == "cuda" else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}{gpu}"
