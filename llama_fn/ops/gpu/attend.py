"""Attention on a GPU, by the kernels in Triton."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.shapes import typed


@typed
def by_triton(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
              positions: Int[Tensor, "*b t"]) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for one query a row (t = 1), by the kernels of `flash_decoding.py`."""
    from llama_fn.ops.gpu import flash_decoding  # noqa: F401  it imports triton, which only machines with a GPU have

    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    heads = queries.reshape(-1, *queries.shape[-4:-2], queries.shape[-1])
    return torch.ops.llama_fn.flash_decoding(heads, keys, values, positions.reshape(-1)).reshape(queries.shape)
