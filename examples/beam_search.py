"""Beam search: the likeliest continuation, found by keeping only the few best beginnings of one.

    python examples/beam_search.py ["Once upon a time"]

To fork a beam is to take its row of the cache once more; the prompt lies in memory once, for all of them.
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
    told, nats = prompt.new_zeros((1, 0)), torch.zeros(1, dtype=logits.dtype)
    checked = lf.narrowing()  # the logits as they are; an error for NaN and infinite ones, which `topk` would take
    while True:
        longer = nats[:, None] + checked(logits[:, -1]).log_softmax(-1)
        nats, best = longer.flatten().topk(min(width, longer.numel()))
        beam, token = best // longer.shape[1], best[:, None] % longer.shape[1]
        told = torch.cat((told[beam], token), 1)
        if told.shape[1] == depth:
            return told, nats
        logits, cache = lf.forward(params, token, lf.select(cache, beam))


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    prompt = tokenizer.encode(sys.argv[1] if len(sys.argv) > 1 else "Long ago there was a")
    for width in (1, 4, 16):
        told, nats = beam_search(params, torch.tensor(prompt), width, 40)
        print(f"width {width:2}, log p = {float(nats[0]):6.2f}: {tokenizer.decode([*prompt, *told[0].tolist()])}\n")
