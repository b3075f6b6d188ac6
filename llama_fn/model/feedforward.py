"""The feed-forward layer: SwiGLU (Shazeer 2020, "GLU variants improve Transformer", eq. 6)."""

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama_fn.model.linear import linear, linears
from llama_fn.ops.weight import Matrix
from llama_fn.shapes import typed


class FeedForward(NamedTuple):
    """The three matrices, which Meta names w1, w3 and w2."""

    w_gate: Float[Matrix, "f d"]
    w_up: Float[Matrix, "f d"]
    w_down: Float[Matrix, "d f"]


@typed
def feed_forward(params: FeedForward, x: Float[Tensor, "*b t d"]) -> Float[Tensor, "*b t d"]:
    """Each token by itself: w_down (silu(w_gate x) * w_up x)."""
    gate, up = linears((params.w_gate, params.w_up), x)
    return linear(params.w_down, F.silu(gate) * up)
