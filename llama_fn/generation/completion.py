"""Completing text: Meta's `text_completion`, and the same a piece at a time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model
from llama_fn.generation import decode
from llama_fn.generation.sampling import Sampler
from llama_fn.generation.sampling import sampler as make_sampler
from llama_fn.shapes import typed


class Completion(NamedTuple):
    """What the model wrote: text, its tokens (no end token), and if asked for, the natural log-probability of each.

    With `echo` all three begin with the prompt; its first token has the log-probability 0.
    """

    text: str
    tokens: list[int]
    logprobs: list[float] | None


@typed
def text_completion(model: Model, prompts: Sequence[str], *, key: Int[Tensor, "2"] | Int[Tensor, "n 2"],
                    max_new_tokens: int | None = None, sampler: Sampler | None = None, stop: Sequence[str] = (),
                    echo: bool = False, logprobs: bool = False) -> list[Completion]:
    """Complete every prompt, up to the model's end token, a string of `stop` (not part of the text), `max_new_tokens`,
    or the end of the context, whichever comes first.

    A row's result is the one that it would get alone, up to rounding: it depends on model, prompt and key. One `key`
    serves every row alike, so that equal prompts get equal texts; `random.split(key, n)` gives each row its own. The
    log-probabilities are the model's, before any narrowing by the sampler. The empty prompt is a text's beginning.

    Raises `ValueError` for a prompt as long as the context, and for as many keys as there are neither one nor rows.
    """
    if isinstance(prompts, str):
        raise ValueError("text_completion: prompts is one text; put it in a list")
    _check_stop(stop)
    if not prompts:
        return []
    encoded, limits = zip(*(_encode(model, prompt, max_new_tokens) for prompt in prompts), strict=True)
    keys = _keys(key, len(prompts)).to(model.params.embedding.device)
    sample = sampler or make_sampler()
    max_len = max(len(tokens) + limit for tokens, limit in zip(encoded, limits, strict=True))
    state, prompt_logits = decode.prefill(model.params, encoded, max_len)

    written: list[list[int]] = [[] for _ in prompts]
    nats: list[list[float]] = [_prompt_logprobs(x, ids) if echo else []
                               for x, ids in zip(prompt_logits, encoded, strict=True)] if logprobs else []
    going = [row for row, limit in enumerate(limits) if limit > 0]
    state, keys = decode.select(state, going), keys[going]
    while going:
        token = decode.draw(state, keys, sample)
        if logprobs:
            chosen = state.logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0].tolist()
        stay = []
        for at, (row, id) in enumerate(zip(going, token.tolist(), strict=True)):
            if id == model.tokenizer.eos_id:
                continue
            written[row].append(id)
            if logprobs:
                nats[row].append(chosen[at])
            if len(written[row]) < limits[row] and not (stop and _stopped(model, prompts[row], written[row], stop)):
                stay.append(at)
        if len(stay) < len(going):
            going, state = [going[at] for at in stay], decode.select(state, stay)
            keys, token = keys[stay], token[stay]
        if going:
            state = decode.advance(model.params, state, token)

    completions = []
    for row, prompt in enumerate(prompts):
        text = "".join(until(model.tokenizer.decode_stream(written[row], _continues(prompt)), stop))
        completions.append(Completion(prompt + text if echo else text, encoded[row] * echo + written[row],
                                      nats[row] if logprobs else None))
    return completions


@typed
def stream(model: Model, prompt: str, *, key: Int[Tensor, "2"], max_new_tokens: int | None = None,
           sampler: Sampler | None = None, stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of `text_completion` for one prompt, in pieces as they come; what may begin a stop string is held back.

    Raises `ValueError` as `text_completion` does, at once and not with the first piece.
    """
    _check_stop(stop)
    tokens, limit = _encode(model, prompt, max_new_tokens)
    ids = _stream_ids(model, tokens, limit, key, sampler or make_sampler())
    return until(model.tokenizer.decode_stream(ids, _continues(prompt)), stop)


def _stream_ids(model: Model, tokens: list[int], limit: int, key: Tensor, sample: Sampler) -> Iterator[int]:
    if limit == 0:
        return
    state, _ = decode.prefill(model.params, [tokens], len(tokens) + limit)
    keys = key[None].to(model.params.embedding.device)
    for count in range(1, limit + 1):
        token = decode.draw(state, keys, sample)
        if int(token) == model.tokenizer.eos_id:
            return
        yield int(token)
        if count < limit:
            state = decode.advance(model.params, state, token)


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first of the `stop` strings in it, without it."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [at for s in stop if (at := held.find(s)) >= 0]:
            held = held[:min(found)]
            break
        safe = len(held) - max((_overlap(held, s) for s in stop), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _stopped(model: Model, prompt: str, written: list[int], stop: Sequence[str]) -> bool:
    text = model.tokenizer.decode(written, _continues(prompt))
    return any(s in text for s in stop)


def _check_stop(stop: Sequence[str]) -> None:
    if isinstance(stop, str):
        raise ValueError("stop is one string; put it in a list, or each of its characters would stop the text")
    if any(not s for s in stop):
        raise ValueError("a stop string is empty: it would stop every text before it begins")


def _continues(prompt: str) -> bool:
    return prompt != ""


def _encode(model: Model, prompt: str, max_new_tokens: int | None) -> tuple[list[int], int]:
    """The prompt's tokens, and how many may follow."""
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    tokens, context = model.tokenizer.encode(prompt), model.params.config.max_seq_len
    if len(tokens) >= context:
        raise ValueError(f"the prompt has {len(tokens)} tokens, and the model's context is {context}, with room for an "
                         f"answer; shorten the prompt to {context - 1} tokens or fewer")
    room = context - len(tokens)
    return tokens, room if max_new_tokens is None else min(room, max_new_tokens)


def _keys(key: Tensor, rows: int) -> Tensor:
    if key.ndim == 1:
        return key.expand(rows, 2)
    if len(key) != rows:
        raise ValueError(f"text_completion: {len(key)} keys for {rows} prompts; give one for all, or one for each")
    return key


def _prompt_logprobs(logits: Tensor, tokens: list[int]) -> list[float]:
    """Of each token of a prompt, after those before it; 0 for the first, which nothing precedes."""
    nats = logits[:len(tokens) - 1].float().log_softmax(-1)
    return [0.0, *nats.gather(-1, torch.tensor(tokens[1:], device=logits.device)[:, None])[:, 0].tolist()]
