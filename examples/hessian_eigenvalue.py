"""The sharpest direction of the loss: the largest eigenvalue of its Hessian, by power iteration.

    python examples/hessian_eigenvalue.py

The Hessian of a million parameters has 10^12 numbers, yet its product with a vector costs little more than two
gradients: it is the derivative of the gradient along that vector, forward over reverse mode (Pearlmutter 1994).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import llama_fn as lf


@lf.typed
def top_eigenpair(f: Callable, params: Any, v: Any, steps: int) -> tuple[Float[Tensor, ""], Any]:
    """The eigenvalue farthest from 0 of the Hessian of f, and its unit vector: v <- H v / |H v|, `steps` > 0 times."""
    for _ in range(steps):
        norm = lf.optim.global_norm(v)
        unit = lf.tree.map(lambda x: x / norm, v)  # noqa: B023, called at once
        v = torch.func.jvp(torch.func.grad(f), (params,), (unit,))[1]
    return lf.tree.vdot(unit, v), unit


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    tokens = torch.tensor([tokenizer.encode(story.text)[:48] for story in lf.stories.stories(lf.random.key(1), 4)])
    start = lf.random.like(lf.random.key(0), params)
    eigenvalue, vector = top_eigenpair(lambda p: lf.loss(p, tokens), params, start, steps=12)
    print(f"largest eigenvalue {eigenvalue:.3f}: gradient descent is stable up to a rate of {2 / eigenvalue:.3f}")
    shares = {path: float(x.square().sum()) for path, x in lf.tree.paths(vector).items()}
    for path in sorted(shares, key=shares.get, reverse=True)[:3]:
        print(f"{shares[path]:7.2%} of its direction lies in {path}")
