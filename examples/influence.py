"""Which training examples support a prediction? Those whose gradients agree with its own (Pruthi et al. 2020).

    python examples/influence.py

A step of gradient descent on an example lowers the loss of a prediction by rate * (gradient . gradient), to first
order. The product is one loss's derivative along the other's gradient: no training example's gradient is stored.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import llama_fn as lf


@lf.typed
def influences(f: Callable, params: Any, train: Any, test: Any, rate: float) -> Float[Tensor, "examples"]:
    """TracIn at one checkpoint: how far a step on f(params, example) lowers f(params, test), for each of `train`."""
    direction = torch.func.grad(f)(params, test)
    return rate * torch.vmap(lambda x: torch.func.jvp(lambda p: f(p, x), (params,), (direction,))[1])(train)


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    heroes = ("brave little girl named Ada", "shy young girl called Ada", "kind little boy named Ada",
              "kind little boy named Tom", "shy young girl called Zoe", "brave little girl named Lily")
    texts, test = [f"Long ago there was a {hero}." for hero in heroes], "Many years ago there was a clever girl named A"
    rows = [tokenizer.encode(text) for text in [*texts, test]]
    tokens = torch.tensor([row + [tokenizer.eos_id] * (20 - len(row)) for row in rows])
    mask = torch.arange(20) < torch.tensor([len(row) for row in rows])[:, None]
    mask[-1, :len(rows[-1]) - 1] = False  # of the test, the last token alone counts
    scores = influences(lambda p, x: lf.loss(p, *x), params, (tokens[:-1], mask[:-1]), (tokens[-1], mask[-1]), 0.01)
    print(f"The last token of {test!r} is predicted better, in nats, by a step on")
    for score, text in sorted(zip(scores.tolist(), texts, strict=True), reverse=True):
        print(f"{score:+.4f}  {text}")
