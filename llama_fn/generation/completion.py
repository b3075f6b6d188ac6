"""Completing text: Meta's `text_completion`, and the same a piece at a time."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation import decode
from llama_fn.generation.sampling import Sampler
from llama_fn.generation.sampling import sampler as make_sampler
from llama_fn.model.block import block
from llama_fn.model.transformer import Params, forward
from llama_fn.model.transformer import head as plain_head
from llama_fn.ranges import integer
from llama_fn.shapes import typed
from llama_fn.tokenizer import Tokenizer
from llama_fn.transforms.lora import Lora

MOST_SILENT = 8  # tokens in a row without any text that are decoded once more with the next one


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
                    echo: bool = False, logprobs: bool = False, adapters: Lora | None = None,
                    layer: Callable[..., Any] = block,
                    head: Callable[..., Any] = plain_head) -> list[Completion]:
    """Complete every prompt, up to the model's end token, a string of `stop` (not part of the text), `max_new_tokens`,
    or the end of the context, whichever comes first.

    A row's result is the one that it would get alone, up to rounding: it depends on model, prompt and key. One `key`
    serves every row alike, so that equal prompts get equal texts; `random.split(key, n)` gives each row its own. The
    log-probabilities are the model's, before any narrowing by the sampler. The empty prompt is a text's beginning. A
    string of `stop` is looked for in what is written, not in the prompt, and not across the end of the prompt.
    `adapters` is a stack of adapters, one a row, which serves all of them in one batch; `layer` and `head` are those of
    `forward`.

    Raises `ValueError` for a prompt as long as the context, and for as many keys as there are neither one nor rows.
    """
    if isinstance(prompts, str):
        raise ValueError("text_completion: prompts is one text; put it in a list")
    check_stop(stop)
    check_tokenizer(model)
    if not prompts:
        return []
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]

    written, nats, prompt_logits = complete(
        model.params, encoded, key, max_new_tokens, sampler, logprobs, ends=model.tokenizer.ends,
        stopped=stops(model.tokenizer, prompts, stop), adapters=adapters, layer=layer, head=head)
    completions = []
    for row, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        text = "".join(until(model.tokenizer.decode_stream(written[row], _continues(prompt)), stop))
        if echo:
            text, written[row] = prompt + text, ids + written[row]
            nats[row] = prompt_logprobs(prompt_logits[row], ids) + nats[row] if logprobs else []
        completions.append(Completion(text, written[row], nats[row] if logprobs else None))
    return completions


def complete(params: Params, encoded: Sequence[list[int]], key: Tensor, max_new_tokens: int | None,
             sampler: Sampler | None, logprobs: bool, *, ends: Collection[int],
             stopped: Callable[[int, int], bool] = lambda row, token: False, adapters: Lora | None = None,
             layer: Callable = block,
             head: Callable = plain_head) -> tuple[list[list[int]], list[list[float]], Tensor]:
    """What follows each row of tokens: its tokens, their log-probabilities if wanted, and the logits after the rows'
    own tokens.
    """
    limits = [room(params, len(ids), max_new_tokens) for ids in encoded]
    keys = keys_of(key, len(encoded), params)
    longest = max(len(ids) + limit for ids, limit in zip(encoded, limits, strict=True))
    run = functools.partial(forward, layer=layer, head=head)
    state, prompt_logits = decode.prefill(params, encoded, longest, adapters, run)
    written: list[list[int]] = [[] for _ in encoded]
    nats: list[list[float]] = [[] for _ in encoded]
    sampler = sampler or make_sampler()
    for step in decode.steps(params, state, keys, sampler, ends, limits, stopped,
                             decode.step_for(params, len(encoded), sampler, layer, head)):
        written[step.row].append(step.token)
        if logprobs:
            nats[step.row].append(float(step.logits.float().log_softmax(-1)[step.token]))
    return written, nats, prompt_logits


@typed
def stream(model: Model, prompt: str, *, key: Int[Tensor, "2"], max_new_tokens: int | None = None,
           sampler: Sampler | None = None, stop: Sequence[str] = (), layer: Callable[..., Any] = block,
           head: Callable[..., Any] = plain_head) -> Iterator[str]:
    """The text of `text_completion` for one prompt, in pieces as they come; what may begin a stop string is held back.

    Raises `ValueError` as `text_completion` does, at once and not with the first piece.
    """
    check_stop(stop)
    check_tokenizer(model)
    tokens = model.tokenizer.encode(prompt)
    limit = room(model.params, len(tokens), max_new_tokens)

    def ids() -> Iterator[int]:
        state = decode.resume(model.params, tokens, None, len(tokens) + limit, layer, head)
        sample = sampler or make_sampler()
        for step in decode.steps(model.params, state, keys_of(key, 1, model.params), sample, model.tokenizer.ends,
                                 [limit], run=decode.step_for(model.params, 1, sample, layer, head)):
            yield step.token

    return until(model.tokenizer.decode_stream(ids(), _continues(prompt)), stop)


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


def stops(tokenizer: Tokenizer, prompts: Sequence[str], stop: Sequence[str]) -> Callable[[int, int], bool]:
    """A function that is told each new token of each row, and says whether the row's text now holds a `stop` string.

    The text is that of `stream`: what was written after the prompt, a character when its last byte is there. Of it,
    only an end is kept, in which a stop string may have begun, so that a token costs the same however long the text is.
    """
    keep = max(map(len, stop), default=1) - 1
    held = [""] * len(prompts)
    undecoded: list[list[int]] = [[] for _ in prompts]
    continued = [_continues(prompt) for prompt in prompts]

    def stopped(row: int, token: int) -> bool:
        if not stop:
            return False
        tokens = [*undecoded[row], token]
        text, waiting = _decoded(tokenizer, tokens, continued[row])
        # A token without text may decide how the next one is decoded (a text's first word loses its space).
        kept = waiting if text else MOST_SILENT
        undecoded[row], continued[row] = tokens[max(0, len(tokens) - kept):], continued[row] or text != ""
        text = held[row] + text
        held[row] = text[len(text) - min(keep, len(text)):]
        return any(s in text for s in stop)

    return stopped


def _decoded(tokenizer: Tokenizer, tokens: list[int], continued: bool) -> tuple[str, int]:
    """The text of tokens up to the last whole character, and how many tokens (a byte each) have begun another."""
    ended, text, begun = False, "", ""

    def ids() -> Iterator[int]:
        nonlocal ended
        yield from tokens
        ended = True

    for piece in tokenizer.decode_stream(ids(), continued):
        if ended:  # the stream's last piece: a U+FFFD for each byte that waited
            begun += piece
        else:
            text += piece
    return text, len(begun)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: Sequence[str]) -> None:
    """Raise `ValueError` for stop strings that would end every text, or are none."""
    if isinstance(stop, str):
        raise ValueError("stop is one string; put it in a list, or each of its characters would stop the text")
    if any(not s for s in stop):
        raise ValueError("a stop string is empty: it would stop every text before it begins")


def _continues(prompt: str) -> bool:
    return prompt != ""


def room(params: Params, count: int, max_new_tokens: int | None) -> int:
    """How many tokens may follow `count` tokens. Raises `ValueError` for so many that none may."""
    if max_new_tokens is not None:
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 0)
    context = params.config.max_seq_len
    if count >= context:
        raise ValueError(f"the prompt has {count} tokens, and the model's context is {context}, with room for an "
                         f"answer; shorten the prompt to {context - 1} tokens or fewer")
    return context - count if max_new_tokens is None else min(context - count, max_new_tokens)


@typed
def keys_of(key: Int[Tensor, "2"] | Int[Tensor, "n 2"], rows: int, params: Params) -> Int[Tensor, "b 2"]:
    """One key a row, on the model's device. Raises `ValueError` for as many as there are neither one nor rows."""
    if key.ndim == 2 and len(key) != rows:
        raise ValueError(f"{len(key)} keys for {rows} prompts; give one for all, or one for each")
    return key.expand(rows, 2).to(params.embedding.device)


def prompt_logprobs(logits: Tensor, tokens: list[int]) -> list[float]:
    """Of each token of a prompt, after those before it; 0 for the first, which nothing precedes."""
    nats = logits[:len(tokens) - 1].float().log_softmax(-1)
    return [0.0, *nats.gather(-1, torch.tensor(tokens[1:], device=logits.device)[:, None])[:, 0].tolist()]
