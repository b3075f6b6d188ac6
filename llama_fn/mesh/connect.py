"""The connection of a process with the others that `torchrun` started."""

import atexit
import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage]  documented, and not in `__all__`
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=10)  # of a collective: the first one waits for the slowest process to compile
RELEASE = 0.05  # seconds for threads that wait for Python's lock; each holds it for microseconds

ALONE = 0, 1


def launched() -> tuple[int, int]:
    """The rank of this process, and how many processes `torchrun` started together; 0 and 1 without it."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return ALONE
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def connect(device: str = "cpu") -> Any:
    """Join the processes that `torchrun` started, or this one alone without it; and give the store that they share.

    Tensors on a GPU are sent by NCCL, all others by gloo. When the process ends, it leaves the others first. Every
    start of the processes has keys of its own in the store: with `--standalone`, torchrun keeps one store, in which
    gloo would find the addresses of processes that have ended (torch 2.13).
    """
    if launched() != ALONE:
        store, rank, count = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    else:
        store, rank, count = HashStore(), 0, 1
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    atexit.register(leave)
    return store


def leave() -> None:
    """Leave the other processes, unless this one has left them already.

    A thread of gloo may still hold a tensor, for whose release it needs Python's lock. If Python ended meanwhile, that
    thread would abort the process (torch 2.13).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(RELEASE)
