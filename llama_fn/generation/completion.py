"""Complete texts: Meta's `text_completion`, and `stream`, which gives the same text in pieces."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation import decode
from llama_fn.generation.sampling import Sampler
from llama_fn.generation.sampling import sampler as make_sampler
from llama_fn.generation.state import prefill, resume
from llama_fn.generation.stop_strings import check_stop, stops, until
from llama_fn.model.block import block
from llama_fn.model.transformer import Params, forward
from llama_fn.model.transformer import head as plain_head
from llama_fn.ranges import integer
from llama_fn.shapes import typed
from llama_fn.transforms.lora import Lora


class Completion(NamedTuple):
    """What the model wrote after one prompt.

    ``tokens`` does not include the end token. ``logprobs`` has the natural log-probability of each token, or is None if
    it was not asked for. With ``echo`` all three begin with the prompt, whose first token gets the log-probability 0.

    >>> completions[0].text
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
    """Complete every prompt (``text_completion`` in Meta's llama/generation.py).

    A text ends at the model's end token, before a string of `stop`, after `max_new_tokens` tokens, or at the end of the
    context, whichever comes first. Stop strings are searched in the new text only. An empty prompt begins a text.

    The result of a row depends on the model, its prompt and its key, and not on other rows (up to rounding). If `key`
    is a single key, all rows use it, and equal prompts get equal texts; ``lf.random.split(key, n)`` gives each of n
    rows its own. `sampler` is the result of the function `sampler`; None samples at temperature 1. The
    log-probabilities are the model's own, before the sampler changes them. `adapters` is a stack of LoRA adapters, one
    for each row. `layer` and `head` are passed to `forward`.

    Raises `ValueError` for a prompt as long as the context, and for a number of keys that is neither one nor the number
    of prompts.

    >>> completions = lf.text_completion(model, ["Once", "One day"], key=key, max_new_tokens=8)
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
        text = "".join(until(model.tokenizer.decode_stream(written[row], prompt != ""), stop))
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
    """Continue rows of tokens; `text_completion`, `generate` and `chat_completion` are this with other inputs.

    A row ends before a token of `ends`, or with a token for which ``stopped(row, token)`` is true. The results are the
    new tokens of each row, their log-probabilities (empty lists unless `logprobs` is true), and the logits after every
    token of the given rows.
    """
    limits = [token_limit(params, len(ids), max_new_tokens) for ids in encoded]
    keys = keys_of(key, len(encoded), params)
    longest = max(len(ids) + limit for ids, limit in zip(encoded, limits, strict=True))
    run = functools.partial(forward, layer=layer, head=head)
    state, prompt_logits = prefill(params, encoded, longest, adapters, run)
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
    """Complete one prompt, and return the text in pieces as it is written.

    The joined pieces are the text of `text_completion` with the same arguments. The end of the text so far is held back
    while it could be the beginning of a string of `stop`.

    Raises `ValueError` as `text_completion` does, when it is called and not with the first piece.

    >>> for piece in lf.stream(model, "Once upon a time", key=key, max_new_tokens=8):
    ...     print(piece, end="", flush=True)
    """
    check_stop(stop)
    check_tokenizer(model)
    tokens = model.tokenizer.encode(prompt)
    limit = token_limit(model.params, len(tokens), max_new_tokens)

    def ids() -> Iterator[int]:
        state = resume(model.params, tokens, None, len(tokens) + limit, layer, head)
        sample = sampler or make_sampler()
        for step in decode.steps(model.params, state, keys_of(key, 1, model.params), sample, model.tokenizer.ends,
                                 [limit], run=decode.step_for(model.params, 1, sample, layer, head)):
            yield step.token

    return until(model.tokenizer.decode_stream(ids(), prompt != ""), stop)


def token_limit(params: Params, count: int, max_new_tokens: int | None) -> int:
    """How many tokens may follow a prompt of `count` tokens. Raises `ValueError` if the context has no room for any."""
    if max_new_tokens is not None:
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 0)
    context = params.config.max_seq_len
    if count >= context:
        raise ValueError(f"the prompt has {count} tokens, and the model's context is {context} for prompt and answer "
                         f"together; shorten the prompt to {context - 1} tokens or fewer")
    return context - count if max_new_tokens is None else min(context - count, max_new_tokens)


@typed
def keys_of(key: Int[Tensor, "2"] | Int[Tensor, "n 2"], rows: int, params: Params) -> Int[Tensor, "b 2"]:
    """One key for each row, on the model's device.

    Raises `ValueError` for a number of keys that is neither one nor the number of rows.
    """
    if key.ndim == 2 and len(key) != rows:
        raise ValueError(f"{len(key)} keys for {rows} prompts; give one for all, or one for each")
    return key.expand(rows, 2).to(params.embedding.device)


def prompt_logprobs(logits: Tensor, tokens: list[int]) -> list[float]:
    """The log-probability of each token of a prompt, given the tokens before it. The first token gets 0."""
    nats = logits[:len(tokens) - 1].float().log_softmax(-1)
    return [0.0, *nats.gather(-1, torch.tensor(tokens[1:], device=logits.device)[:, None])[:, 0].tolist()]
