"""The rows of an embedding table."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.modes import unread
from llama_fn.ops.inside import clamped


def look_up(weight: Float[Tensor, "v d"], tokens: Int[Tensor, "*b t"]) -> Float[Tensor, "*b t d"]:
    """The rows with these numbers, weight[tokens].

    A token outside the table that no check has read (see `inside.py`) gives NaN.
    """
    if unread(tokens):  # on a GPU, an index outside the table would end all work of the process
        index, outside = clamped(tokens, 0, len(weight))
        return F.embedding(index.long(), weight).masked_fill(outside[..., None], torch.nan)
    # `weight[tokens]` would do, but torch 2.13 compiles its forward-over-reverse derivative wrong.
    return F.embedding(tokens.long(), weight)
