"""Scoring: how likely a text is to a model, or each of several options."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation.completion import prompt_logprobs
from llama_fn.generation.sampling import check_drawable
from llama_fn.generation.state import resume, select
from llama_fn.model.transformer import forward
from llama_fn.shapes import typed


class Score(NamedTuple):
    """The scored tokens of a text, the natural log-probability of each, and the UTF-8 bytes that they stand for.

    A log-probability is that of a token given all tokens before it.

    ``replaced`` is 0 unless the first letters of the text merge with the last letters of its prefix into one token.
    Then it is the log-probability of the prefix's own tokens that the merged token replaces (see `score`).

    >>> lf.score(model, ["Once upon a time"])[0].bits_per_byte
    """

    tokens: list[int]
    logprobs: list[float]
    bytes: int
    replaced: float = 0.0

    @property
    def total(self) -> float:
        """The log-probability of all scored tokens together."""
        return math.fsum(self.logprobs)

    @property
    def log_ratio(self) -> float:
        """The number by which to compare options after one prefix: log p(prefix and text) - log p(prefix).

        It is ``total - replaced``.
        """
        return self.total - self.replaced

    @property
    def bits_per_byte(self) -> float:
        """The number by which to compare texts of different lengths: -total / (ln 2 * bytes). It is 0 for no bytes."""
        return (0 - self.total) / math.log(2) / max(self.bytes, 1)


@typed
def score(model: Model, texts: Sequence[str], batch_size: int = 8, *,
          prefixes: Sequence[str] | None = None) -> list[Score]:
    """The log-probability of every token of every text.

    The begin token is included and has the log-probability 0. No end token is scored. `batch_size` texts go through the
    model at a time.

    With `prefixes`, one for each text, only the continuation is scored. Prefix and text are encoded together, and the
    scored tokens are those after the longest beginning that they share with the tokens of the prefix alone. If the
    prefix ends within a word, its last letters may become part of another token: for the prefix "In the end s" and the
    text "he", the token " she" is scored. ``tokens``, ``total`` and ``bytes`` then include the letter "s", and
    ``replaced`` is the log-probability of the token " s".

    Raises `ValueError` for a text longer than the context (`perplexity` accepts those), for an empty text after a
    prefix, if there is not one prefix for each text, and for logits that are NaN or infinite.

    >>> lf.score(model, ["Once upon a time"])[0].total
    """
    if isinstance(texts, str) or isinstance(prefixes, str):
        raise ValueError(f"score: {'texts' if isinstance(texts, str) else 'prefixes'} is one text; put it in a list")
    check_tokenizer(model)
    if batch_size < 1:
        raise ValueError(f"score: batch_size must be at least 1, got {batch_size}")
    if prefixes is not None and len(prefixes) != len(texts):
        raise ValueError(f"score: {len(prefixes)} prefixes for {len(texts)} texts; give one for each")
    if prefixes is None:
        joints = [_Joint([], model.tokenizer.encode(text), 0, len(text.encode())) for text in texts]
    else:
        joints = [_joint(model, *pair, f"text {i}") for i, pair in enumerate(zip(prefixes, texts, strict=True))]
    for i, joint in enumerate(joints):
        _check_length(model, len(joint.whole), f"text {i}")
    rows = [joint.whole for joint in joints] + [joint.prefix for joint in joints if joint.replaces]
    nats: list[list[float]] = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first:first + batch_size]
        logits, _ = forward(model.params, _padded(batch, model))
        check_drawable(logits, "score: the")
        nats += [prompt_logprobs(x, ids) for x, ids in zip(logits, batch, strict=True)]
    alone = iter(nats[len(joints):])
    return [joint.score(row[joint.start:], next(alone)[joint.start:] if joint.replaces else [])
            for joint, row in zip(joints, nats, strict=False)]


@typed
def score_options(model: Model, prompt: str, options: Sequence[str]) -> list[Score]:
    """How likely each option is as a continuation of the prompt.

    The option with the highest ``log_ratio`` is the likeliest. A long option is less likely than a short one for its
    length alone; to leave the length out of account, compare ``bits_per_byte``, of which the lowest is the best. The
    scores are those of `score` with the prompt as prefix, and do not depend on the other options. The prompt goes
    through the model only once, and the options continue copies of its cache.

    Raises `ValueError` for no option, for an empty one, for one that does not fit into the context, and for logits that
    are NaN or infinite.

    >>> best = max(lf.score_options(model, "Once", [" upon", " up"]), key=lambda score: score.total)
    """
    check_tokenizer(model)
    if isinstance(options, str) or not options:
        raise ValueError(f"score_options: give one option or more in a list, got {options!r}")
    joints = [_joint(model, prompt, option, f"option {i}") for i, option in enumerate(options)]
    for i, joint in enumerate(joints):
        _check_length(model, len(joint.whole), f"the prompt with option {i}")
    common = min(joint.start for joint in joints)
    rests = [joint.whole[common:] for joint in joints]
    if any(joint.replaces for joint in joints):
        rests.append(joints[0].prefix[common:])
    longest = max(1, *map(len, rests))
    shared = joints[0].prefix[:common]
    state = select(resume(model.params, shared, None, common + longest), [0] * len(rests))
    logits = state.logits[:, None]
    if longest > 1:
        logits = torch.cat((logits, forward(model.params, _padded(rests, model)[:, :-1], state.cache)[0]), 1)
    check_drawable(logits, "score_options: the")
    exact = logits.float().log_softmax(-1)
    nats = [[float(row[i, id]) for i, id in enumerate(ids)] for row, ids in zip(exact, rests, strict=True)]
    return [joint.score(row[joint.start - common:], nats[-1][joint.start - common:] if joint.replaces else [])
            for joint, row in zip(joints, nats, strict=False)]


class _Joint(NamedTuple):
    """The tokens of a prefix, the tokens of prefix and text together, where they differ, and the bytes after that."""

    prefix: list[int]
    whole: list[int]
    start: int
    bytes: int

    @property
    def replaces(self) -> bool:
        """Whether the encoding of the whole replaces tokens of the prefix."""
        return self.start < len(self.prefix)

    def score(self, nats: list[float], replaced: list[float]) -> Score:
        """The score of the text, from the log-probabilities of its tokens and of the replaced ones."""
        return Score(self.whole[self.start:], nats, self.bytes, math.fsum(replaced))


def _joint(model: Model, prefix: str, text: str, what: str) -> _Joint:
    if not text:
        raise ValueError(f"{what} is empty: there is nothing to score")
    alone, whole = model.tokenizer.encode(prefix), model.tokenizer.encode(prefix + text)
    start = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
    merged = model.tokenizer.decode(alone[start:], continued=start > 1)  # letters of the prefix that are scored, too
    return _Joint(alone, whole, start, len(text.encode()) + len(merged.encode()))


def _check_length(model: Model, count: int, what: str) -> None:
    context = model.params.config.max_seq_len
    if count > context:
        raise ValueError(f"{what} has {count} tokens, more than the model's context of {context}")


def _padded(rows: list[list[int]], model: Model) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows], device=model.params.embedding.device)
