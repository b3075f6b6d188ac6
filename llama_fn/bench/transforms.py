"""The measurements of `llama-fn bench transforms`: what a transform costs compared with code written for a batch."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_fn import random, tree
from llama_fn.bench.opacus import opacus_grads
from llama_fn.bench.timing import Figures, interleave, ratio, spread
from llama_fn.checkpoint.load import load
from llama_fn.compiled.jit import jit
from llama_fn.config import Config
from llama_fn.generation.completion import text_completion
from llama_fn.generation.drafted import speculate
from llama_fn.generation.sampling import narrowing, sampler
from llama_fn.model.block import block
from llama_fn.model.cache import Cache, init_cache
from llama_fn.model.init import init_params
from llama_fn.model.transformer import Params, forward
from llama_fn.training import optim
from llama_fn.training.loss import loss
from llama_fn.transforms import lora
from llama_fn.transforms.per_sample import per_sample_grads, per_sample_norms
from llama_fn.transforms.remat import remat

SMALL = Config(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, vocab_size=1024, hidden_dim=688, max_seq_len=512)
PROMPT = "Once upon a time"


def lines(times: dict[str, list[float]], ratios: dict[str, tuple[str, str]]) -> Figures:
    """The milliseconds of each function, and ratios of some of them, with their quartiles.

    `ratios` maps the title of a ratio to the names of the two functions.
    """
    figures = {f"{name}, ms": spread([1e3 * t for t in seconds]) for name, seconds in times.items()}
    return figures | {what: str(ratio(times[over], times[under])) for what, (over, under) in ratios.items()}


def tokens_of(*shape: int) -> Tensor:
    """Random token ids of the small model."""
    return random.bits(random.key(1), shape) * SMALL.vocab_size >> 32


def prompts(rounds: int) -> Figures:
    """Time `vmap` over prompts against the same prompts as a batch, in prefill and in decode, compiled."""
    params = init_params(random.key(0), SMALL)

    def prefill(params: Params, tokens: Tensor) -> Tensor:
        return forward(params, tokens)[0]

    def decode(params: Params, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache | None]:
        return forward(params, tokens, cache)

    figures = {}
    for rows, t in ((8, 128), (8, 512)):
        batch, mapped, tokens = jit(prefill), jit(torch.vmap(prefill, (None, 0))), tokens_of(rows, t)
        works = {f"prefill of {rows} x {t} as a batch": lambda f=batch, x=tokens: f(params, x),
                 f"prefill of {rows} x {t} under vmap": lambda f=mapped, x=tokens: f(params, x)}
        figures |= _speed(works, rounds)
    for rows in (8, 32):
        cache = init_cache(SMALL, (rows,), max_len=256)
        cache = cache._replace(length=torch.full((rows,), 100))
        batch, mapped, tokens = jit(decode), jit(torch.vmap(decode, (None, 0, 0))), tokens_of(rows, 1)
        works = {f"decode of {rows} rows as a batch": lambda f=batch, x=tokens, c=cache: f(params, x, c),
                 f"decode of {rows} rows under vmap": lambda f=mapped, x=tokens, c=cache: f(params, x, c)}
        figures |= _speed(works, rounds)
    return figures


def _speed(works: dict[str, Callable], rounds: int) -> Figures:
    with torch.no_grad():
        times = interleave(works, rounds, "vmap over prompts")
    batch, mapped = works
    return lines(times, {f"speed of {mapped.split(' under')[0]} under vmap, of the batch's": (batch, mapped)})


def samples(rounds: int) -> Figures:
    """Time one gradient a sample, and its norm alone, against one gradient of the batch.

    There are 32 samples of 64 tokens, and all three are compiled. A loop that calls `grad` once a sample is eager. If
    Opacus is installed, its hooks are timed on the same model built of modules; llama_fn does not depend on it.
    """
    params, tokens = init_params(random.key(0), SMALL), tokens_of(32, 65)
    batch, each = jit(torch.func.grad(loss)), jit(lambda p, x: per_sample_grads(loss, p, x))
    norms = jit(lambda p, x: per_sample_norms(loss, p, x))
    works = {"one gradient of the batch": lambda: batch(params, tokens),
             "one gradient a sample": lambda: each(params, tokens),
             "norms alone": lambda: norms(params, tokens),
             "a loop of grad": lambda: [torch.func.grad(loss)(params, row) for row in tokens]}
    ratios = {f"time of {name}, of the batch's": (name, "one gradient of the batch") for name in list(works)[1:3]}
    ratios["speed of one gradient a sample, of the loop's"] = ("a loop of grad", "one gradient a sample")
    peaks = {name: peak_bytes(works[name]) for name in list(works)[:3]}
    if hooks := opacus_grads(params, tokens):
        ours, theirs = tree.paths(each(params, tokens)), hooks()
        if any(not torch.allclose(theirs[path].reshape(x.shape), x, atol=1e-4) for path, x in ours.items()):
            raise AssertionError("Opacus' gradients are not those of `per_sample_grads`")
        works["Opacus' hooks"] = hooks
        ratios["speed of one gradient a sample, of Opacus'"] = ("Opacus' hooks", "one gradient a sample")
    figures = lines(interleave(works, rounds, "per-sample gradients"), ratios)
    figures |= {f"peak memory of {name}, MiB": f"{peak / 2**20:.0f}" for name, peak in peaks.items()}
    first, _, last = peaks.values()
    return figures | {"peak memory of norms alone, of the batch's": f"{last / first:.2f}"}


def adapters(rounds: int) -> Figures:
    """Time one training step of 16 LoRA adapters, all at once and one after another.

    The adapters have rank 8 on `wq` and `wv`, and each learns from 64 tokens of its own.
    """
    params, tokens, rates = init_params(random.key(0), SMALL), tokens_of(16, 65), torch.linspace(1e-4, 1e-3, 16)

    def step(params: Params, adapter: lora.Lora, state: Any, row: Tensor, rate: Tensor) -> tuple:
        grads = torch.func.grad(lambda a: loss(lora.apply(params, a), row))(adapter)
        updates, state = optim.adamw(rate).update(grads, state, adapter)
        return optim.apply_updates(adapter, updates), state

    stacked = torch.vmap(lambda key: lora.init(key, params, 8))(random.split(random.key(2), 16))
    states = torch.vmap(optim.adamw(1e-3).init)(stacked)
    runs = [tree.map(lambda x: x[i], (stacked, states, tokens, rates)) for i in range(16)]  # noqa: B023, used at once
    many, single = jit(torch.vmap(step, (None, 0, 0, 0, 0))), jit(step)
    once, eager, compiled = "16 adapters in one step", "one after another, eager", "one after another, compiled"
    times = interleave({once: lambda: many(params, stacked, states, tokens, rates),
                        eager: lambda: [step(params, *one) for one in runs],
                        compiled: lambda: [single(params, *one) for one in runs]}, rounds, "adapters")
    return lines(times, {f"speed of {once}, of {other}": (other, once) for other in (eager, compiled)})


def recomputation(rounds: int) -> Figures:
    """Time a loss and its gradient with `remat` around each of 12 layers and without, on 32 x 128 tokens, compiled."""
    config = dataclasses.replace(SMALL, n_layers=12)
    params, tokens = init_params(random.key(0), config), tokens_of(32, 129)
    plain = jit(torch.func.grad_and_value(loss))
    recomputing = jit(torch.func.grad_and_value(lambda p, x: loss(p, x, layer=remat(block))))
    works = {"without remat": lambda: plain(params, tokens), "with remat": lambda: recomputing(params, tokens)}
    peaks = {name: peak_bytes(work) for name, work in works.items()}
    times = interleave(works, rounds, "remat")
    figures = lines(times, {"time with remat, of that without": ("with remat", "without remat")})
    figures |= {f"peak memory {name}, MiB": f"{peak / 2**20:.0f}" for name, peak in peaks.items()}
    return figures | {"peak memory without remat, of that with": f"{peaks['without remat'] / peaks['with remat']:.2f}"}


def speculation(rounds: int) -> Figures:
    """Time whole stories by the shipped model, alone and with its draft model, eager.

    All of them use the same key, so that they write the same text.
    """
    model, draft, key = load("stories"), load("stories-draft"), random.key(3)
    figures = {}
    for name, temperature in (("temperature 1", 1.0), ("greedy", 0.0)):
        works: dict[str, Callable] = {
            f"alone, {name}": lambda t=temperature: text_completion(model, [PROMPT], key=key, sampler=sampler(t))}
        for n in (2, 4):
            works[f"with a draft of {n}, {name}"] = lambda t=temperature, n=n: speculate(
                model, draft, [PROMPT], key=key, n=n, narrow=narrowing(t))
        alone, *drafted = works
        texts = {name: works[name]()[0] for name in drafted}
        times = interleave(works, rounds, "speculative decoding")
        figures |= lines(times, {f"speed {name}, of the model's alone": (alone, name) for name in drafted})
        figures |= {f"accepted {name}": f"{x.accepted} of {x.proposed}" for name, x in texts.items()}
    return figures


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of CPU memory that a call allocates at once. A first call, which may compile, is not counted."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and end on standard error
    work()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    assert profile is not None and profile.kineto_results is not None, "a finished profile has results"
    allocated = peak = 0
    for event in sorted(profile.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  torch's stub lacks it
            peak = max(peak, allocated)
    return peak


TRANSFORMS: dict[str, Callable[[int], Figures]] = {
    "samples": samples, "prompts": prompts, "adapters": adapters, "recomputation": recomputation,
    "speculation": speculation}
