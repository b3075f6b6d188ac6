"""The Gauss-Newton matrix G = J^T H J: the loss's curvature, were the logits linear in the parameters.

    python examples/gauss_newton.py

J is the Jacobian of the logits, H the Hessian of the loss with respect to them (Schraudolph 2002). H is positive
semidefinite, and so is G, where the Hessian of the whole may bend down.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.func import grad, jvp, vjp

import llama_fn as lf


@lf.typed
def gauss_newton_vector(logits: Callable, loss: Callable, params: Any, v: Any) -> Any:
    """G v, for the function loss(logits(params)): forward along v, through H, and back."""
    at, moved = jvp(logits, (params,), (v,))
    bent = jvp(grad(loss), (at,), (moved,))[1]
    return vjp(logits, params)[1](bent)[0]


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    tokens = torch.tensor([tokenizer.encode(story.text)[:64] for story in lf.stories.stories(lf.random.key(1), 4)])

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    for path in ("output", "norm", "blocks.3.feed_forward.w_down", "blocks.3.attention.wq"):
        def logits(w: torch.Tensor, path: str = path) -> torch.Tensor:  # of one weight, the others as they are
            return lf.forward(lf.tree.map_with_path(lambda p, x: w if p == path else x, params), tokens[:, :-1])[0]

        weight = lf.tree.paths(params)[path]
        v = lf.random.like(lf.random.key(0), weight)
        gv, hv = gauss_newton_vector(logits, loss, weight, v), jvp(grad(lambda w: loss(logits(w))), (weight,), (v,))[1]
        print(f"{path:28}  v . G v = {(v * gv).sum():8.4f}   v . H v = {(v * hv).sum():8.4f}")
