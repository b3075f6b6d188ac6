"""The trace of the loss's Hessian, from random probes: E[v . H v] = tr H where E[v v^T] = 1 (Hutchinson 1990).

    python examples/hessian_trace.py

`vmap` over keys runs all probes at once. Random signs are the best of them: the variance is 2 (|H|^2 - |diag H|^2),
for what lies off the diagonal alone, where that of normal numbers is 2 |H|^2.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import llama_fn as lf


@lf.typed
def hessian_trace(f: Callable, params: Any, keys: Int[Tensor, "probes 2"],
                  draw: Callable = lf.random.rademacher) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The mean of v . H v over the probes, one a key (two or more), and its standard error."""

    def sample(key: Tensor) -> Tensor:
        v = lf.random.like(key, params, draw)
        return lf.tree.vdot(v, torch.func.jvp(torch.func.grad(f), (params,), (v,))[1])

    samples = torch.vmap(sample)(keys)
    return samples.mean(), samples.std() / len(keys) ** 0.5


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    tokens = torch.tensor([tokenizer.encode(story.text)[:48] for story in lf.stories.stories(lf.random.key(1), 2)])
    for draw in (lf.random.rademacher, lf.random.normal):
        keys = lf.random.split(lf.random.key(0), 8)
        trace, error = hessian_trace(lambda p: lf.loss(p, tokens), params, keys, draw)
        print(f"the trace, from {len(keys)} {draw.__name__} probes: {trace:.1f} +- {error:.1f}")
