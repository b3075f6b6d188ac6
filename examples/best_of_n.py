"""Best of n: a prompt goes through the model once, n continuations are drawn after it, and the likeliest is printed.

    python examples/best_of_n.py ["Once upon a time"]

The cache is forked: the prompt's keys and values are in memory once, for all n continuations.
"""

import sys

import torch
from torch import Tensor

import llama_fn as lf


def continuations(params: lf.Params, prompt: Tensor, keys: Tensor, count: int, end: int) -> tuple[Tensor, Tensor]:
    """`count` tokens for each of n keys, and the log-probability of those up to the token `end`: (n, count) and (n)."""
    sample, checked = lf.sampler(), lf.narrowing()  # the logits as they are; an error for NaN and infinite ones
    draw = torch.vmap(lambda key, length, logits: sample(lf.random.fold_in(key, length), logits))
    empty = lf.init_cache(params.config, max_len=len(prompt), dtype=params.norm.dtype)
    logits, cache = lf.forward(params, prompt, empty)
    logits, cache = logits[-1].expand(len(keys), -1), lf.fork(cache, (len(keys),), max_len=len(prompt) + count)
    drawn, nats, going = [], 0, 1
    for _ in range(count):
        drawn.append(draw(keys, cache.length, checked(logits)))
        nats = nats + going * logits.log_softmax(-1).gather(1, drawn[-1][:, None])[:, 0]
        going = going * (drawn[-1] != end)
        logits, cache = lf.forward(params, drawn[-1][:, None], cache)
        logits = logits[:, -1]
    return torch.stack(drawn, 1), nats


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    prompt = tokenizer.encode(sys.argv[1] if len(sys.argv) > 1 else "Long ago there was a")
    keys = lf.random.split(lf.random.key(0), 16)
    drawn, nats = continuations(params, torch.tensor(prompt), keys, 40, tokenizer.eos_id)
    for name, i in (("likeliest", nats.argmax()), ("unlikeliest", nats.argmin())):
        print(f"{name} of 16, log p = {float(nats[i]):.2f}: {tokenizer.decode([*prompt, *drawn[i].tolist()])}\n")
