"""What a run measures at each step: the loss, the learning rate, the speed, and the memory."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from llama_fn.checkpoint.load import Model
from llama_fn.config import Config
from llama_fn.memory import resident_bytes
from llama_fn.training.step import Metrics


class Samples(NamedTuple):
    """Texts to sample every ``every`` steps and after the last one.

    ``draw`` gives records with the texts, from the model and the number of steps taken. The records go to
    ``metrics.jsonl``, so a function that depends on its arguments alone makes a resumed run repeat them.
    """

    every: int
    draw: Callable[[Model, int], Iterable[dict]]


def flops_per_token(config: Config, context: int, *, frozen: bool = False) -> int:
    """The floating-point operations of a training step for each token.

    A weight of a matrix takes 2 operations forward and 4 backward: 6 N. The embedding is looked up and not multiplied,
    so N does not count it. Attention takes 12 k g h operations in each layer for each token of the context. (Chowdhery
    et al. 2022, "PaLM", appendix B. As there, the masked half of attention is counted, and recomputation is not.)

    ``frozen`` is for an adapter on top of weights that are not trained: their own gradients are not computed, and a
    weight takes 2 operations backward.
    """
    d, layers, width = config.dim, config.n_layers, config.n_heads * config.head_dim
    kv = config.n_kv_heads * config.head_dim
    weights = layers * (2 * d * width + 2 * d * kv + 3 * d * config.hidden_dim) + config.vocab_size * d
    return (4 if frozen else 6) * weights + 12 * layers * width * context


def measured_flops(device: torch.device | str | None, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The operations per second of a large matrix product, the fastest of those that fit in about ``seconds``."""
    size = 1024 if torch.device(device or "cpu").type == "cpu" else 8192
    x = torch.ones(size, size, device=device, dtype=dtype)
    fastest, end = float("inf"), time.perf_counter() + seconds
    while fastest == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * size**3 / fastest


def step_record(step: int, metrics: Metrics, *, learning_rate: float, interval: float, seconds: float, flops: int,
                peak: float | None, memory: dict[str, int]) -> dict:
    """The record of a step in ``metrics.jsonl``.

    ``interval`` is the time of this step in seconds, and ``seconds`` the time of the run so far, in all its sessions.
    ``flops`` is `flops_per_token`. ``peak`` is the machine's highest number of operations per second, or None if it is
    not known. ``memory`` is that of `memory_in_use`.

    "tokens_per_second" counts the tokens of which the loss is the mean, in this step alone. "tflops" are 10**12
    operations per second, for these tokens. "mfu" (model FLOPs utilization) is their share of the peak; it is there if
    the peak is known.
    """
    speed = int(metrics.count) / interval
    record = {"step": step, "loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm),
              "learning_rate": learning_rate, "tokens_per_second": round(speed), "seconds": round(seconds, 2),
              "tflops": _digits(speed * flops / 1e12)}
    if peak:
        record["mfu"] = _digits(speed * flops / peak)
    return {**record, **memory}


def memory_in_use(device: torch.device | str | None) -> dict[str, int]:
    """The process's resident memory, "memory", and the peak of tensors on a GPU, "gpu_memory", in bytes.

    What the system does not tell is not there.
    """
    resident = resident_bytes()
    memory = {} if resident is None else {"memory": resident}
    if torch.device(device or "cpu").type == "cuda":
        memory["gpu_memory"] = torch.cuda.max_memory_allocated(device)
    return memory


def _digits(value: float) -> float:
    """The value with four digits, which is more than a measurement of time has."""
    return float(f"{value:.4g}")
