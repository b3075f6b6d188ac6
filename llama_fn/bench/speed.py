"""The measurements of `llama-fn bench decode|prefill|train`, each compared with what this machine can do at most."""

import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.bench.ceiling import fastest_product, memory_speed, waited_for
from llama_fn.bench.device import device_of
from llama_fn.bench.module_step import module_step
from llama_fn.bench.peers import gpt_fast, hugging_face, llama_cpp
from llama_fn.bench.timing import Figures, interleave, ratio, spread
from llama_fn.bench.work import DTYPES, Work, filled, matrix_numbers, weights
from llama_fn.compiled.layers import jit_layers
from llama_fn.model.cache import Cache, init_cache
from llama_fn.model.transformer import Params, forward, head, trunk
from llama_fn.training import optim
from llama_fn.training.jit_step import jit_step

PEERS = {"hf": ("Hugging Face", hugging_face), "llama.cpp": ("llama.cpp", llama_cpp),
         "gpt-fast": ("gpt-fast", gpt_fast)}
# How many decode steps are timed as one. The CPU then prepares a step while the GPU still works on the one before, as
# in a real decode loop. Threads of another library that have not gone to sleep slow only the first of the steps.
CHAIN = {"cuda": 32, "cpu": 8}


def decode(work: Work, rounds: int) -> Figures:
    """Decode one token a row. A step reads all weights once, so it is compared with the speed of the memory."""
    params, dtype, device = weights(work), DTYPES[work.dtype], device_of(work.device)
    count = CHAIN.get(device.type, CHAIN["cpu"])
    if work.context + count > work.max_len:
        raise ValueError(f"bench: {count} tokens are measured together, and max_len = {work.max_len} has no room for "
                         f"them after {work.context}")
    run = jit_layers(_greedy)
    tokens = torch.zeros((work.batch, 1), dtype=torch.int64, device=device)
    cache = filled(params.config, work, dtype)
    start = cache.length

    def step() -> None:
        nonlocal tokens, cache
        for _ in range(count):
            tokens, cache = run(params, tokens, cache)
        cache = cache._replace(length=start)  # the next call decodes at the same positions again

    def repeated(once: Callable[[], Any]) -> Callable[[], None]:
        def run_all() -> None:
            for _ in range(count):
                once()

        return run_all

    name, memory, size = memory_speed(device)
    works: dict[str, Callable] = {name: memory, "llama_fn": step}
    for peer in work.compare:
        works[PEERS[peer][0]] = repeated(PEERS[peer][1](params, work.batch, 1, work.context, work.max_len))
    with torch.no_grad():
        times = {what: [t / (1 if what == name else count) for t in seconds] for what, seconds in
                 interleave(waited_for(works, device), rounds, f"decode, {work.shape}").items()}
    kv = sum(x.nbytes for x in tree.leaves((cache.k, cache.v))) * (work.context + (count + 1) / 2) / work.max_len
    needed = sum(x.nbytes for x in tree.leaves(params)) - params.embedding.nbytes + kv
    floor = [seconds * needed / size for seconds in times[name]]
    figures = _times(times, work.batch) | {"bytes a step, GB": f"{needed / 1e9:.3f}"}
    figures[f"{name}, GB/s"] = spread([size / t / 1e9 for t in times.pop(name)])
    figures["llama_fn, GB/s"] = spread([needed / t / 1e9 for t in times["llama_fn"]])
    figures["share of the memory's speed"] = str(ratio(floor, times["llama_fn"]))
    return figures | _compared(times)


def _greedy(params: Params, tokens: Tensor, cache: Cache, **parts: Any) -> tuple[Tensor, Cache]:
    logits, new = forward(params, tokens, cache, **parts)
    return logits.float().argmax(-1), new  # torch's argmax takes four times as long in bfloat16


def prefill(work: Work, rounds: int) -> Figures:
    """Prefill `work.context` tokens into an empty cache, with the logits after the last token alone.

    The time is compared with that of matrix products of the same size on this machine, in the weights' dtype or in
    float32, whichever is faster.
    """
    params, dtype, device = weights(work), DTYPES[work.dtype], device_of(work.device)
    config = params.config
    tokens = torch.arange(work.batch * work.context, device=device).reshape(work.batch, -1) % config.vocab_size
    state = [init_cache(config, (work.batch,), max_len=work.max_len, dtype=dtype, device=device)]

    run = jit_layers(trunk)

    def step() -> None:
        x, cache = run(params, tokens, state[0])
        head(params.norm, params.output, x[:, -1:], config.norm_eps)
        state[0] = cache._replace(length=torch.zeros_like(cache.length))

    works: dict[str, Callable] = {"llama_fn": step,
                                  "a matrix product": fastest_product(tokens.numel(), config, dtype, device)}
    for name in work.compare:
        works[PEERS[name][0]] = PEERS[name][1](params, work.batch, work.context, 0, work.max_len)
    with torch.no_grad():
        times = interleave(waited_for(works, device), rounds, f"prefill, {work.shape}")
    matrices = matrix_numbers(params.config) - params.output.shape[0] * params.output.shape[1]
    products = times.pop("a matrix product")
    numbers = config.dim * config.hidden_dim
    floor = [seconds * matrices / numbers for seconds in products]
    figures = _times(times, tokens.numel())
    figures["a matrix product, GFLOP/s"] = spread([2 * tokens.numel() * numbers / t / 1e9 for t in products])
    return figures | {"share of the products' speed": str(ratio(floor, times["llama_fn"]))} | _compared(times)


def train(work: Work, rounds: int) -> Figures:
    """Take one AdamW step on `work.batch` rows of `work.context` tokens, compiled by its parts.

    The time is compared with that of the matrix products in it.
    """
    params, dtype, device = weights(work), DTYPES[work.dtype], device_of(work.device)
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-4))
    step, state = jit_step(optimizer), [params, optimizer.init(params)]
    tokens = torch.arange(work.batch * (work.context + 1), device=device).reshape(1, work.batch, -1)
    tokens %= params.config.vocab_size
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def run() -> None:
        state[:] = step(*state, tokens, mask)[:2]

    rows, config = work.batch * work.context, params.config
    works: dict[str, Callable] = {"llama_fn": run, "a matrix product": fastest_product(rows, config, dtype, device)}
    if work.compare:
        works["a module"] = module_step(params, tokens[0])
    times = interleave(waited_for(works, device), rounds, "train")
    matrices = matrix_numbers(params.config)
    products = times.pop("a matrix product")
    numbers = config.dim * config.hidden_dim
    floor = [3 * seconds * matrices / numbers for seconds in products]  # one product forward, and two backward
    figures = _times(times, rows)
    figures["a matrix product, GFLOP/s"] = spread([2 * rows * numbers / t / 1e9 for t in products])
    return figures | {"share of the products' speed": str(ratio(floor, times["llama_fn"]))} | _compared(times)


def _times(times: dict[str, list[float]], tokens: int) -> Figures:
    named = {name: times[name] for name in ("llama_fn", *(name for name, _ in PEERS.values())) if name in times}
    figures = {f"{name}, ms": spread([1e3 * t for t in seconds]) for name, seconds in named.items()}
    figures |= {f"{name}, tokens a second": spread([tokens / t for t in seconds]) for name, seconds in named.items()}
    figures["peak resident memory, GiB"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}"
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        figures["peak memory of the GPU, GiB"] = f"{peak / 2**30:.2f}"
    return figures


def _compared(times: dict[str, list[float]]) -> Figures:
    others = [name for name in times if name != "llama_fn"]
    return {f"llama_fn's time, of {name}'s": str(ratio(times["llama_fn"], times[name])) for name in others}
