"""What a measurement is compared with: the speed of this machine's memory and of its matrix products."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_fn.bench.timing import interleave
from llama_fn.config import Config
from llama_fn.private import onednn_product

READ = 2**29  # bytes that are read to measure the speed of a CPU's memory; on a GPU eight times as many are copied


def memory_speed(device: torch.device) -> tuple[str, Callable[[], Any], int]:
    """A function that moves many bytes: its name in the tables, the function, and how many bytes it moves.

    On a GPU it is a copy, whose bytes are read and written. On a CPU it is a sum, because a CPU reads faster than it
    copies, and a sum of integers, because a CPU adds them faster than floats.
    """
    if device.type == "cuda":
        old = torch.ones(8 * READ, dtype=torch.uint8, device=device)
        new = torch.empty_like(old)
        return "copying memory", lambda: new.copy_(old), 2 * old.nbytes
    numbers = torch.ones(READ // 8, dtype=torch.int64)
    return "reading memory", numbers.sum, READ


def fastest_product(rows: int, config: Config, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A feed-forward product of `rows` rows: in `dtype` or in float32, by torch or by oneDNN, whichever is fastest."""
    works: dict[str, Callable] = {}
    for kind in {dtype, torch.float32}:
        a = torch.ones(rows, config.dim, dtype=kind, device=device)
        b = torch.ones(config.hidden_dim, config.dim, dtype=kind, device=device)
        works[f"{kind}"] = functools.partial(torch.nn.functional.linear, a, b)
        if kind == torch.float32 and device.type == "cpu" and torch.backends.mkldnn.is_available():
            works["oneDNN"] = functools.partial(onednn_product, a, b.mT)
    seconds = interleave(waited_for(works, device), 3, "products")
    return works[min(works, key=lambda name: min(seconds[name]))]


def waited_for(works: dict[str, Callable], device: torch.device) -> dict[str, Callable]:
    """The same functions; on a GPU each then waits until the GPU has finished."""
    if device.type != "cuda":
        return works
    return {name: lambda work=work: (work(), torch.cuda.synchronize(device)) for name, work in works.items()}
