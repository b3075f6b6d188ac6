"""Speculative decoding: a small model drafts n tokens, and the large one checks them in one pass.

    python examples/speculate.py ["Once upon a time"]

First greedy and step by step with `forward` alone, then by `lf.speculate`, which samples. The text is the large model's
own. A rejected token is taken back by a smaller `length` of the cache.
"""

import sys

import torch

import llama_fn as lf


def greedy(params: lf.Params, draft: lf.Params, prompt: list[int], n: int, count: int) -> tuple[list[int], int]:
    """The model's own `count` likeliest tokens, one after the other, and how many passes it took."""
    text, passes, room = list(prompt), 0, len(prompt) + count + n
    checked = lf.narrowing()  # the logits as they are; an error for NaN and infinite ones, which `argmax` would take
    cache, small = (lf.init_cache(x.config, max_len=room, dtype=x.norm.dtype) for x in (params, draft))
    while len(text) < len(prompt) + count:
        guess = list(text)
        for _ in range(n):
            logits, small = lf.forward(draft, torch.tensor(guess[int(small.length):]), small)
            guess.append(int(checked(logits[-1]).argmax()))
        logits, cache = lf.forward(params, torch.tensor(guess[int(cache.length):]), cache)
        own, passes = checked(logits[-n - 1:]).argmax(-1).tolist(), passes + 1  # after the text, and after each guess
        agreed = next((i for i in range(n) if guess[len(text) + i] != own[i]), n)
        text += own[:agreed + 1]
        cache, small = (x._replace(length=x.length.clamp(max=len(text) - 1)) for x in (cache, small))
    return text[len(prompt):len(prompt) + count], passes


if __name__ == "__main__":
    model, draft = lf.load("stories"), lf.load("stories-draft")
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time there was a"
    tokens, passes = greedy(model.params, draft.params, model.tokenizer.encode(prompt), 4, 60)
    print(f"{len(tokens)} tokens in {passes} passes: {prompt}{model.tokenizer.decode(tokens, continued=True)}\n")
    drawn, = lf.speculate(model, draft, [prompt], key=lf.random.key(0), n=4)
    print(f"{drawn.accepted} of {drawn.proposed} drafted tokens accepted: {prompt}{drawn.text}")
