"""Best-first search: the likeliest continuation of all, in one cache, which is rewound by its length.

    python examples/tree_search.py ["Once upon a time"]

Probabilities only fall as texts grow, so the first text of the full length that comes to the front of the queue is the
likeliest (Dijkstra 1959). The tokens that the cache already holds of that text are kept, and the others are computed.
"""

import heapq
import operator
import sys

import torch

import llama_fn as lf


def likeliest(params: lf.Params, prompt: list[int], depth: int) -> tuple[list[int], float, int]:
    """The likeliest `depth` tokens after a prompt, their log-probability, and how many tokens the model computed."""
    cache = lf.init_cache(params.config, max_len=len(prompt) + depth, dtype=params.norm.dtype)
    held, computed, queue = [], 0, [(0.0, prompt)]
    checked = lf.narrowing()  # the logits as they are; an error for NaN and infinite ones, which have no order
    while True:
        cost, text = heapq.heappop(queue)
        if len(text) == len(prompt) + depth:
            return text[len(prompt):], -cost, computed
        common = [*map(operator.eq, held, text), False].index(False)
        known = min(common, len(text) - 1)
        logits, cache = lf.forward(params, torch.tensor(text[known:]), cache._replace(length=torch.tensor(known)))
        held, computed = text, computed + len(text) - known
        for token, nats in enumerate(checked(logits[-1]).log_softmax(-1).tolist()):
            heapq.heappush(queue, (cost - nats, [*text, token]))


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    prompt = tokenizer.encode(sys.argv[1] if len(sys.argv) > 1 else "Long ago there was a brave little")
    for depth in (4, 7, 10):
        written, nats, computed = likeliest(params, prompt, depth)
        print(f"{depth} tokens, log p = {nats:6.2f}, {computed} computed: {tokenizer.decode([*prompt, *written])}")
