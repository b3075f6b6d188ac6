"""The loss: cross-entropy of the next token, in nats."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_fn.mesh.entropy import entropy_of_parts
from llama_fn.mesh.sharded import total, vocabulary_over
from llama_fn.model.block import block
from llama_fn.model.transformer import Params, head, trunk
from llama_fn.modes import compiling
from llama_fn.ops.inside import clamped, inside
from llama_fn.ops.weight import Matrix, Vector, with_all_rows
from llama_fn.private import is_mapped_within
from llama_fn.ranges import number
from llama_fn.shapes import typed
from llama_fn.training.chunked_loss import in_chunks, too_many_logits
from llama_fn.transforms.remat import remat


@typed
def cross_entropy(norm: Float[Vector, "d"], output: Float[Matrix, "v d"], x: Float[Tensor, "*b t d"],
                  targets: Int[Tensor, "*b t"], eps: float, z_loss: float = 0.0,
                  label_smoothing: float = 0.0) -> Float[Tensor, "*b t"]:
    """The definition: of logits z and the target y, -log p[y] = log sum over v of exp z[v] - z[y].

    With `label_smoothing` e, the target is y with probability 1 - e, and any of the vocabulary, each as likely, with
    probability e: (1 - e) (-log p[y]) + e mean over v of (-log p[v]) (Szegedy et al. 2016, section 7). `z_loss` times
    the square of log sum exp z is added, which keeps the logits small (Chowdhery et al. 2022, "PaLM", section 5).
    The softmax is taken in float32 at least.
    """
    logits = head(norm, output, x, eps)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = exact.log_softmax(-1)
    nats = -_picked(log_p, targets)
    if label_smoothing:
        nats = (1 - label_smoothing) * nats - label_smoothing * log_p.mean(-1)
    if z_loss:
        nats = nats + z_loss * exact.logsumexp(-1).square()
    return nats


class Entropy(NamedTuple):
    """What computes `cross_entropy` of all tokens; and of a chunk of them, of which the backward keeps no logits."""

    of_all: Callable[..., Tensor]
    of_chunk: Callable[..., Tensor]


def token_entropy(norm: Vector, output: Matrix, x: Tensor, targets: Tensor, eps: float, z_loss: float = 0.0,
                  label_smoothing: float = 0.0) -> Tensor:
    """`cross_entropy`, on the parts of the vocabulary where devices have parts."""
    compute = cross_entropy if vocabulary_over(output) is None else entropy_of_parts
    return compute(norm, output, x, targets, eps, z_loss, label_smoothing)


ENTROPY = Entropy(token_entropy, remat(token_entropy))


@typed
def loss(params: Params, tokens: Int[Tensor, "*b t"], mask: Bool[Tensor, "*b t"] | None = None,
         segments: Int[Tensor, "*b t"] | None = None, *, z_loss: float = 0.0, label_smoothing: float = 0.0,
         layer: Callable[..., Any] = block) -> Float[Tensor, ""]:
    """The mean of -log p(token | all before it) over the tokens that count: all but a row's first where `mask` is true.

    If none counts, the loss is 0. Behind the last token that counts, a row may hold any ids, -100 too. To average over
    several batches exactly, add up `loss_sum` instead: a mean of means weighs a token by the size of its batch.
    `segments` and `layer` are those of `forward`. The first token of a segment does not count: with segments, the loss
    of a row is that of its documents. `z_loss` and `label_smoothing` are those of ``cross_entropy``.

    The logits of many tokens over a large vocabulary are never all in memory, forward or backward.

    Raises `ValueError` for a row of one token, for a number outside its range, and in eager mode, mapped or not, for a
    token outside the vocabulary on which the loss depends.

    >>> grads, loss = torch.func.grad_and_value(lf.loss)(params, tokens)
    """
    nats, counts = _nats(params, tokens, mask, segments, z_loss, label_smoothing, layer, ENTROPY)
    # Divided after the sum, its compiled reverse-over-forward derivative would crash (torch 2.13, pytorch#197067).
    return total(params.norm, (nats / total(params.norm, counts.sum()).clamp(min=1)).sum())


@typed
def loss_sum(params: Params, tokens: Int[Tensor, "*b t"], mask: Bool[Tensor, "*b t"] | None = None,
             segments: Int[Tensor, "*b t"] | None = None, *, z_loss: float = 0.0, label_smoothing: float = 0.0,
             layer: Callable[..., Any] = block,
             entropy: Entropy = ENTROPY) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The sum of -log p over the tokens that count, and their number. The softmax is taken in float32 at least.

    `entropy` is what computes it for each token, from the last layer's output.

    >>> total, count = lf.loss_sum(params, batch)
    """
    nats, counts = _nats(params, tokens, mask, segments, z_loss, label_smoothing, layer, entropy)
    return total(params.norm, nats.sum()), total(params.norm, counts.sum())


@typed
def row_nats(params: Params, tokens: Int[Tensor, "*b t"], mask: Bool[Tensor, "*b t"] | None = None,
             *, layer: Callable[..., Any] = block, entropy: Entropy = ENTROPY) -> Float[Tensor, "*b"]:
    """The sum of -log p over the tokens that count, for each row."""
    return _nats(params, tokens, mask, None, 0.0, 0.0, layer, entropy)[0].sum(-1)


def _nats(params: Params, tokens: Tensor, mask: Tensor | None, segments: Tensor | None, z_loss: float,
          label_smoothing: float, layer: Callable, entropy: Entropy) -> tuple[Tensor, Tensor]:
    """The cross-entropy of every token but the first, 0 where it does not count; and whether it does."""
    z_loss = number("loss: z_loss", z_loss)
    label_smoothing = number("loss: label_smoothing", label_smoothing, high=1.0)
    if tokens.shape[-1] < 2:
        raise ValueError(f"loss: a row needs 2 tokens or more, one to predict the next from, got {tokens.shape[-1]}")
    if mask is not None:  # no token that counts sees those behind it, so that any ids will do there
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        last = places[1:].where(mask[..., 1:], -1).amax(-1, keepdim=True)  # of the tokens that count
        tokens = tokens.where(places <= last, 0)
    within = None if segments is None else segments[..., :-1]
    if is_mapped_within(tokens):  # the sum over the devices would add up rows of several
        with_all_rows("loss, mapped over rows", params)
    x, _ = trunk(params, tokens[..., :-1], segments=within, layer=layer)
    targets, v = tokens[..., 1:].long(), params.config.vocab_size
    counts = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask[..., 1:]
    if segments is not None:
        counts = counts & (segments[..., 1:] == segments[..., :-1])
    targets, outside = clamped(inside(targets, "target", 0, v), 0, v)

    f = in_chunks(entropy.of_chunk) if too_many_logits(params.output, x) else entropy.of_all
    nats = f(params.norm, params.output, x, targets, params.config.norm_eps, z_loss, label_smoothing)
    return nats.masked_fill(outside, torch.nan).masked_fill(~counts, 0), counts


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """The numbers of x at an index of its last axis.

    Compiled, they are picked by a sum, which becomes part of the loop over x. Torch's gather would end that loop.
    """
    if compiling():
        return x.where(torch.arange(x.shape[-1], device=x.device) == index[..., None], 0).sum(-1)
    return x.gather(-1, index[..., None])[..., 0]
