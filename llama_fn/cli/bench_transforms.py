"""The measurements of `llama-fn bench transforms`: what a transform costs beside the same work written for a batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from llama_fn import random
from llama_fn.cli.timing import interleave, quartiles, ratio
from llama_fn.config import Config
from llama_fn.model.cache import Cache, init_cache
from llama_fn.model.init import init_params
from llama_fn.model.transformer import Params, forward
from llama_fn.transforms.jit import jit

SMALL = Config(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, vocab_size=1024, hidden_dim=688, max_seq_len=512)
Figures = dict[str, str]


def lines(times: dict[str, list[float]], ratios: dict[str, tuple[str, str]]) -> Figures:
    """The works' milliseconds, and the ratios asked for, each with its quartiles."""
    figures = {}
    for name, seconds in times.items():
        low, median, high = (1e3 * x for x in quartiles(seconds))
        figures[f"{name}, ms"] = f"{median:.4g} ({low:.4g} to {high:.4g})"
    return figures | {what: str(ratio(times[over], times[under])) for what, (over, under) in ratios.items()}


def tokens_of(*shape: int) -> Tensor:
    """Random tokens of the small model."""
    return random.bits(random.key(1), shape) * SMALL.vocab_size >> 32


def prompts(rounds: int) -> Figures:
    """`vmap` over prompts beside the same prompts as a batch, in prefill and in decode, compiled."""
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


TRANSFORMS: dict[str, Callable[[int], Figures]] = {"prompts": prompts}
