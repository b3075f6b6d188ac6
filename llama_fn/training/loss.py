"""The loss: cross-entropy of the next token, in nats."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_fn.model.block import block
from llama_fn.model.transformer import Params, forward
from llama_fn.ops.inside import held, inside
from llama_fn.shapes import typed


@typed
def loss(params: Params, tokens: Int[Tensor, "*b t"], mask: Bool[Tensor, "*b t"] | None = None,
         segments: Int[Tensor, "*b t"] | None = None, *, layer: Callable[..., Any] = block) -> Float[Tensor, ""]:
    """The mean of -log p(token | all before it) over the tokens that count: all but a row's first where `mask` is true.

    If none counts, the loss is 0. Behind the last token that counts, a row may hold any ids, -100 too. To average over
    several batches exactly, add up `loss_sum` instead: a mean of means weighs a token by the size of its batch.
    `segments` and `layer` are those of `forward`. The first token of a segment does not count: with segments, the loss
    of a row is that of its documents.

    Raises `ValueError` for a row of one token, and in eager mode, mapped or not, for a token outside the vocabulary on
    which the loss depends.
    """
    nats, counts = _nats(params, tokens, mask, segments, layer)
    # Divided after the sum, its compiled reverse-over-forward derivative would crash (torch 2.13, pytorch#197067).
    return (nats / counts.sum().clamp(min=1)).sum()


@typed
def loss_sum(params: Params, tokens: Int[Tensor, "*b t"], mask: Bool[Tensor, "*b t"] | None = None,
             segments: Int[Tensor, "*b t"] | None = None,
             *, layer: Callable[..., Any] = block) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The sum of -log p over the tokens that count, and their number. The softmax is taken in float32 at least."""
    nats, counts = _nats(params, tokens, mask, segments, layer)
    return nats.sum(), counts.sum()


def _nats(params: Params, tokens: Tensor, mask: Tensor | None, segments: Tensor | None,
          layer: Callable) -> tuple[Tensor, Tensor]:
    """-log p of every token but the first, 0 where it does not count; and whether it does."""
    if tokens.shape[-1] < 2:
        raise ValueError(f"loss: a row needs 2 tokens or more, one to predict the next from, got {tokens.shape[-1]}")
    if mask is not None:  # no token that counts sees those behind it, so that any ids will do there
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        last = places[1:].where(mask[..., 1:], -1).amax(-1, keepdim=True)  # of the tokens that count
        tokens = tokens.where(places <= last, 0)
    within = None if segments is None else segments[..., :-1]
    logits, _ = forward(params, tokens[..., :-1], segments=within, layer=layer)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets, v = tokens[..., 1:].long(), exact.shape[-1]
    counts = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask[..., 1:]
    if segments is not None:
        counts = counts & (segments[..., 1:] == segments[..., :-1])
    index, outside = held(inside(targets, "target", 0, v), 0, v)
    nats = -exact.log_softmax(-1).gather(-1, index[..., None])[..., 0].masked_fill(outside, torch.nan)
    return nats.masked_fill(~counts, 0), counts
