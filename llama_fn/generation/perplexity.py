"""Perplexity: how well a model predicts a text of any length."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation.sampling import check_drawable
from llama_fn.model.transformer import forward
from llama_fn.shapes import typed


class Perplexity(NamedTuple):
    """The negative log-probability of a text in nats, and its number of tokens and of UTF-8 bytes.

    >>> lf.perplexity(model, "Once upon a time").bits_per_byte
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per token. It depends on the tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """The bits per byte of UTF-8. Models with different tokenizers can be compared by it."""
        return self.nats / math.log(2) / self.bytes


@typed
def perplexity(model: Model, text: str, window: int | None = None, stride: int | None = None,
               report: Callable[[int], object] = lambda tokens: None) -> Perplexity:
    """How well a model predicts a text of any length, in a sliding window.

    The window holds the begin token and up to `window` tokens (None: the model's context). It moves by `stride` tokens
    at a time (None: half a window), so that every token after the first window is predicted from at least
    ``window - stride`` tokens before it. `report` is called with the number of tokens that were predicted since its
    last call.

    Raises `ValueError` for an empty text, for numbers out of range, and for logits that are NaN or infinite.

    >>> lf.perplexity(model, "Once upon a time")
    """
    check_tokenizer(model)
    context = model.params.config.max_seq_len
    window = context if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= context:
        raise ValueError(f"window must lie in [1, {context}], the model's context, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie in [1, {window}], the window, got {stride}")
    bos, *ids = model.tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty: there is nothing to predict")
    nats, done = 0.0, 0
    while done < len(ids):
        end = min(len(ids), done + (stride if done else window))
        begin = max(0, end - window)
        row = torch.tensor([bos, *ids[begin:end]], device=model.params.embedding.device)
        logits, _ = forward(model.params, row[:-1])
        check_drawable(logits, "perplexity: the")
        new = logits[done - begin:].float().log_softmax(-1).gather(-1, row[1 + done - begin:, None])
        nats -= float(new.double().sum())
        report(end - done)
        done = end
    return Perplexity(nats, len(ids), len(text.encode()))
