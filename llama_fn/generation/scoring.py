"""Scoring: how likely a model finds a text, an option among others, a file."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation import decode
from llama_fn.generation.completion import prompt_logprobs
from llama_fn.model.transformer import forward
from llama_fn.shapes import typed


class Score(NamedTuple):
    """Tokens, and the natural log-probability of each after all before it."""

    tokens: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """The log-probability of all of them."""
        return math.fsum(self.logprobs)


@typed
def score(model: Model, texts: Sequence[str], batch_size: int = 8) -> list[Score]:
    """The log-probability of every token of every text, its begin included, which has 0; no end is scored.

    Raises `ValueError` for a text longer than the context (`perplexity` takes those).
    """
    if isinstance(texts, str):
        raise ValueError("score: texts is one text; put it in a list")
    check_tokenizer(model)
    if batch_size < 1:
        raise ValueError(f"score: batch_size must be at least 1, got {batch_size}")
    encoded = [model.tokenizer.encode(text) for text in texts]
    for i, ids in enumerate(encoded):
        _check_length(model, len(ids), f"text {i}")
    scores = []
    for first in range(0, len(encoded), batch_size):
        rows = encoded[first:first + batch_size]
        logits, _ = forward(model.params, _padded(rows, model))
        scores += [Score(ids, prompt_logprobs(x, ids)) for x, ids in zip(logits, rows, strict=True)]
    return scores


@typed
def score_options(model: Model, prompt: str, options: Sequence[str]) -> list[Score]:
    """How likely each option goes on from the prompt: of multiple choices, the one with the highest `total`.

    Scored are the tokens of prompt and option together, without those that all of them begin with: so the totals differ
    by exactly what the texts' log-probabilities differ by, even where an option's first letters merge with the prompt's
    last. Long options are unlikely as such: compare `total / len(option.encode())` where that should not count. What is
    common goes through the model once; the options continue copies of its cache.
    """
    check_tokenizer(model)
    if isinstance(options, str) or len(options) < 2:
        raise ValueError(f"score_options: give two options or more in a list, got {options!r}")
    if "" in options:
        raise ValueError(f"score_options: option {list(options).index('')} is empty: there is nothing to score")
    encoded = [model.tokenizer.encode(prompt + option) for option in options]
    for i, ids in enumerate(encoded):
        _check_length(model, len(ids), f"the prompt with option {i}")
    shortest = min(map(len, encoded))
    common = next((i for i in range(shortest) if len({ids[i] for ids in encoded}) > 1), shortest)
    shared = encoded[0][:common]
    rests = [ids[common:] for ids in encoded]
    longest = max(map(len, rests))
    state = decode.select(decode.resume(model.params, shared, None, common + longest), [0] * len(options))
    first = state.logits[:, None]
    if longest > 1:
        logits, _ = forward(model.params, _padded(rests, model)[:, :-1], state.cache)
        first = torch.cat((first, logits), 1)
    nats = first.float().log_softmax(-1)
    return [Score(ids, [float(nats[row, i, id]) for i, id in enumerate(ids)]) for row, ids in enumerate(rests)]


class Perplexity(NamedTuple):
    """A text's negative log-probability in nats, and over how many tokens and bytes of UTF-8 it goes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the nats a token: it depends on the tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """It does not: models with other tokenizers can be compared by it."""
        return self.nats / math.log(2) / self.bytes


@typed
def perplexity(model: Model, text: str, window: int | None = None, stride: int | None = None,
               report: Callable[[int], None] = lambda tokens: None) -> Perplexity:
    """Every token of a text of any length, predicted from the tokens before it in a sliding window.

    A window holds the begin token and up to `window` tokens (None: the model's context); it slides on by `stride`
    (None: half of it), so that every token but the first ones is predicted from at least `window - stride` before it.
    `report` is told of tokens as they are done. Raises `ValueError` for an empty text and for numbers out of range.
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
        new = logits[done - begin:].float().log_softmax(-1).gather(-1, row[1 + done - begin:, None])
        nats -= float(new.double().sum())
        report(end - done)
        done = end
    return Perplexity(nats, len(ids), len(text.encode()))


def _check_length(model: Model, count: int, what: str) -> None:
    context = model.params.config.max_seq_len
    if count > context:
        raise ValueError(f"{what} has {count} tokens, more than the model's context of {context}")


def _padded(rows: list[list[int]], model: Model) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows], device=model.params.embedding.device)
