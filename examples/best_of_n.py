"""Best of n: a prompt goes through the model once, n continuations are drawn after it, and the likeliest is told.

    python examples/best_of_n.py ["Once upon a time"]

A continuation is a function of a key and a cache, mapped over the keys; the prompt's cache is not mapped. It is shared
until the first write, which gives each continuation a cache of its own: `chunk_size` bounds how many there are at once.
"""

import sys

import torch
from torch import Tensor

import llama_fn as lf


def continuations(params: lf.Params, prompt: Tensor, keys: Tensor, count: int, end: int,
                  chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """`count` tokens for each of n keys, and the log-probability of those up to the token `end`: (n, count) and (n)."""
    sample = lf.sampler()
    empty = lf.init_cache(params.config, max_len=len(prompt) + count, dtype=params.norm.dtype)
    logits, cache = lf.forward(params, prompt, empty)

    def drawn(key: Tensor, logits: Tensor, cache: lf.Cache) -> tuple[Tensor, Tensor]:
        tokens, nats, going = [], 0, 1
        for _ in range(count):
            tokens.append(sample(lf.random.fold_in(key, cache.length), logits))
            nats = nats + going * logits.log_softmax(-1).gather(0, tokens[-1][None])[0]
            going = going * (tokens[-1] != end)
            logits, cache = lf.forward(params, tokens[-1][None], cache)
            logits = logits[-1]
        return torch.stack(tokens), nats

    return torch.vmap(drawn, (0, None, None), chunk_size=chunk_size)(keys, logits[-1], cache)


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    prompt = tokenizer.encode(sys.argv[1] if len(sys.argv) > 1 else "Long ago there was a")
    keys = lf.random.split(lf.random.key(0), 16)
    told, nats = continuations(params, torch.tensor(prompt), keys, 40, tokenizer.eos_id, chunk_size=8)
    for name, i in (("likeliest", nats.argmax()), ("unlikeliest", nats.argmin())):
        text = tokenizer.decode([*prompt, *told[i].tolist()])
        print(f"{name} of {len(nats)}, log p = {float(nats[i]):.2f}: {text}\n")
