"""Choosing the next token: a pure function of a key, the logits and the tokens so far."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn import random
from llama_fn.modes import concrete
from llama_fn.ops.inside import inside
from llama_fn.random import Key
from llama_fn.ranges import integer, number
from llama_fn.shapes import typed

Sampler = Callable[..., Tensor]
Narrowing = Callable[..., Tensor]

DAMAGED = ("logits are NaN or infinite (+inf, or -inf for every token): the weights or the cache are damaged, or "
           "numbers overflowed in a 16-bit dtype; load the model in bfloat16 or float32")


class Sampling(NamedTuple):
    """The settings of `sampler`, as a value that can be called: it draws the next token by them.

    What it draws depends on the settings and on the arguments alone. So a compiled step may contain it, and serves
    every sampler of equal settings.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @typed
    def __call__(self, key: Key, logits: Float[Tensor, "*b v"],
                 tokens: Int[Tensor, "*b s"] | None = None) -> Int[Tensor, "*b"]:
        """The next token after `tokens` (where a negative one stands for none)."""
        narrowed = _narrowed(self, logits, tokens)
        drawn = narrowed.argmax(-1) if self.temperature == 0 else random.categorical(key, narrowed)
        return drawn if concrete(logits) else drawn.where(drawable(logits), -1)


def sampler(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
            repetition_penalty: float | None = None) -> Sampler:
    """A function `sample(key, logits, tokens=None)` that draws the next token.

    It draws from the model's distribution, narrowed as `narrowing` with the same settings narrows it. Samplers of equal
    settings are equal.

    Raises `ValueError` for a setting outside its range; ``sample`` does for logits that are not ``drawable``. Compiled
    or mapped, it cannot look at them, and draws -1, which is no token.

    >>> token = lf.sampler(temperature=0.8, top_p=0.9)(key, logits)
    """
    return _in_range(temperature, top_k, top_p, min_p, repetition_penalty)


def narrowing(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
              min_p: float | None = None, repetition_penalty: float | None = None) -> Narrowing:
    """A function `narrow(logits, tokens=None)` to the logits, in float32 at least, that a sampler draws by.

    In this order: `repetition_penalty` r (Keskar et al. 2019, "CTRL", 4.1) divides a positive logit of a token that is
    there already by r, and multiplies a negative one; `temperature` divides all logits, and 0 leaves the likeliest
    token alone; `top_k` (Fan et al. 2018) keeps the k likeliest, `top_p` (Holtzman et al. 2020) the fewest likeliest
    whose probabilities sum to p, `min_p` (Nguyen et al. 2024) those of at least p times the highest probability.

    Raises `ValueError` for a setting outside its range; ``narrow`` does for logits that are not ``drawable``, unless it
    is compiled or mapped and cannot look at them.

    >>> probabilities = lf.narrowing(top_p=0.9)(logits).softmax(-1)
    """
    settings = _in_range(temperature, top_k, top_p, min_p, repetition_penalty)

    @typed
    def narrow(logits: Float[Tensor, "*b v"], tokens: Int[Tensor, "*b s"] | None = None) -> Float[Tensor, "*b v"]:
        """The logits after `tokens` (where a negative one stands for none); -inf for what is never drawn."""
        return _narrowed(settings, logits, tokens)

    return narrow


def _narrowed(settings: Sampling, logits: Tensor, tokens: Tensor | None) -> Tensor:
    temperature, top_k, top_p, min_p, repetition_penalty = settings
    check_drawable(logits, "sample: the")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if repetition_penalty is not None:
        if tokens is None:
            raise ValueError("sample: a repetition penalty needs the tokens so far")
        logits = penalize(logits, tokens, repetition_penalty)
    if temperature == 0:
        return keep_likeliest(logits)
    if temperature != 1:  # the likeliest becomes 0 first, so that nothing overflows however low the temperature
        least = torch.finfo(logits.dtype).tiny  # a smaller number may be 0 there, and 0 / 0 is NaN
        logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, least)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None and top_p < 1:  # all probabilities sum to 1 only up to rounding
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return logits


def drawable(logits: Tensor) -> Tensor:
    """Whether a token can be drawn from logits: none is NaN or +inf, and one at least is not -inf (a mask)."""
    return logits.amax(-1).isfinite()


def check_drawable(logits: Tensor, whose: str) -> None:
    """Raise `ValueError` for logits that are not ``drawable``, where numbers can be read."""
    # The host asks what `drawable` asks: it has to read a number anyway, and three small kernels take longer.
    if concrete(logits) and not all(map(math.isfinite, logits.amax(-1).flatten().tolist())):
        raise ValueError(f"{whose} {DAMAGED}")


@typed
def penalize(logits: Float[Tensor, "*b v"], tokens: Int[Tensor, "*b s"], penalty: float) -> Float[Tensor, "*b v"]:
    """Make every token that is there already less likely, once, however often it is there."""
    v = logits.shape[-1]
    there = torch.zeros_like(logits[..., :1]).expand(*logits.shape[:-1], v + 1)  # the last stands for none
    tokens = tokens.long()  # v may be more than a narrow dtype holds
    tokens = inside(torch.where(tokens < 0, 0, tokens), "token", 0, v).where(tokens >= 0, v)
    there = there.scatter(-1, tokens.clamp(max=v), 1.0)[..., :v].bool()  # on a GPU one outside is none
    limits = torch.finfo(logits.dtype)  # beyond them a penalty would be 0 or infinite there, and 0 times that is NaN
    penalty = min(max(penalty, limits.tiny), limits.max)
    penalized = torch.where(logits > 0, (logits / penalty).clamp(max=limits.max), logits * penalty)
    return torch.where(there, penalized, logits)


@typed
def keep_likeliest(logits: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """The likeliest token (of equals the first) gets 0, the others -inf."""
    there = torch.arange(logits.shape[-1], device=logits.device) == logits.argmax(-1, keepdim=True)
    return torch.zeros_like(logits).masked_fill(~there, -math.inf)


@typed
def keep_top_k(logits: Float[Tensor, "*b v"], k: int) -> Float[Tensor, "*b v"]:
    """The k likeliest tokens keep their logits (of equals the first), the others get -inf."""
    k = min(k, logits.shape[-1])
    lowest = logits.topk(k).values[..., -1:]
    return _keep_down_to(logits, lowest, k)


@typed
def keep_top_p(logits: Float[Tensor, "*b v"], p: float) -> Float[Tensor, "*b v"]:
    """The smallest set of likeliest tokens with a probability of p or more keep their logits, the others get -inf."""
    falling = logits.sort(dim=-1, descending=True).values
    weights = falling.softmax(-1)
    count = (weights.cumsum(-1) - weights < p).sum(-1, keepdim=True).clamp(min=1)  # a tiny p may be 0 in float32
    return _keep_down_to(logits, falling.gather(-1, count - 1), count)


@typed
def keep_min_p(logits: Float[Tensor, "*b v"], p: float) -> Float[Tensor, "*b v"]:
    """The tokens at least p times as likely as the likeliest keep their logits, the others get -inf."""
    floor = logits.amax(-1, keepdim=True) + (math.log(p) if p > 0 else -math.inf)
    return logits.masked_fill(logits < floor, -math.inf)


def _keep_down_to(logits: Tensor, lowest: Tensor, count: Tensor | int) -> Tensor:
    """The `count` likeliest keep their logits, of which `lowest` is the last (of equals the first)."""
    above, equal = logits > lowest, logits == lowest
    room = count - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room))), -math.inf)


def _in_range(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None,
              repetition_penalty: float | None) -> Sampling:
    """The settings as plain numbers, each in its range."""
    return Sampling(
        number("sampler: temperature", temperature),
        None if top_k is None else integer("sampler: top_k", top_k, 1),
        None if top_p is None else number("sampler: top_p", top_p, 0, 1, above=True),
        None if min_p is None else number("sampler: min_p", min_p, 0, 1),
        None if repetition_penalty is None else number("sampler: repetition_penalty", repetition_penalty, above=True))
