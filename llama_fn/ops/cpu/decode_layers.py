"""All layers of a decode step in one call, and its head in another, by the C++ kernels of `decode_layers.cpp`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama_fn.ops.cpu import build
from llama_fn.ops.operators import define


def decode_layers(tokens: Tensor, embedding: Tensor, frequencies: Tensor, norms: list[Tensor], values: list[Tensor],
                  scales: list[Tensor], keys: Sequence[Any], cached_values: Sequence[Any], positions: Tensor,
                  eps: float) -> Tensor:
    """What the last layer gives, "*b 1 d", for tokens "*b 1" at `positions` "*b".

    `frequencies` are RoPE's. Each layer has two norms, seven matrices (their values, and the scales of quantized ones),
    and a cache "*b k s h", into which its keys and values are written.
    """
    build.load()
    return torch.ops.llama_fn.decode_layers(tokens, embedding, frequencies, norms, values, scales, keys, cached_values,
                                            positions, eps, torch.get_num_threads())


def decode_head(x: Tensor, norm: Tensor, values: list[Tensor], scales: list[Tensor], eps: float) -> Tensor:
    """The logits "*b v" of rows x "*b d": RMSNorm, then the output matrix, whose values and scales these are."""
    build.load()
    return torch.ops.llama_fn.decode_head(x, norm, values, scales, eps, torch.get_num_threads())


define("decode_layers(Tensor tokens, Tensor embedding, Tensor frequencies, Tensor[] norms, Tensor[] values, "
       "Tensor[] scales, Tensor(a!)[] keys, Tensor(b!)[] cached_values, Tensor positions, float eps, int threads) "
       "-> Tensor", lambda tokens, embedding, *_: embedding.new_empty((*tokens.shape, embedding.shape[1])))
define("decode_head(Tensor x, Tensor norm, Tensor[] values, Tensor[] scales, float eps, int threads) -> Tensor",
       lambda x, norm, values, *_: x.new_empty((*x.shape[:-1], values[0].shape[0])))
