"""Beam search: look for the likeliest continuation, and keep only the few best beginnings of one.

    python examples/beam_search.py ["Once upon a time"]

A beam is forked by taking its row of the cache twice. The prompt's part of the cache is in memory once, for all beams.
"""

import sys

import torch
from torch import Tensor

import llama_fn as lf


def beam_search(params: lf.Params, prompt: Tensor, width: int, depth: int) -> tuple[Tensor, Tensor]:
    """The `width` best found continuations of `depth` tokens, the best first, and their log-probabilities."""
    empty = lf.init_cache(params.config, max_len=len(prompt), dtype=params.norm.dtype)
    logits, cache = lf.forward(params, prompt, empty)
    logits, cache = logits[None], lf.fork(cache, (1,), max_len=len(prompt) + depth)
    written, nats = prompt.new_zeros((1, 0)), torch.zeros(1, dtype=logits.dtype)
    checked = lf.narrowing()  # the logits as they are; an error for NaN and infinite ones, which `topk` would take
    while True:
        longer = nats[:, None] + checked(logits[:, -1]).log_softmax(-1)
        nats, best = longer.flatten().topk(min(width, longer.numel()))
        beam, token = best // longer.shape[1], best[:, None] % longer.shape[1]
        written = torch.cat((written[beam], token), 1)
        if written.shape[1] == depth:
            return written, nats
        logits, cache = lf.forward(params, token, lf.select(cache, beam))


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    prompt = tokenizer.encode(sys.argv[1] if len(sys.argv) > 1 else "Long ago there was a")
    for width in (1, 4, 16):
        written, nats = beam_search(params, torch.tensor(prompt), width, 40)
        print(f"width {width:2}, log p = {float(nats[0]):6.2f}: {tokenizer.decode([*prompt, *written[0].tolist()])}\n")
