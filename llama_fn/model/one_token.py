"""All layers of one token a row by a kernel in C++ (`one_token.cpp`), beside the definition: `block` after `block`.

To call a layer's kernels one by one takes Python 0.2 ms a layer: what it knows of a tensor has left the processor's
cache when the weights have gone through it.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from llama_fn.model import avx2
from llama_fn.model.block import Block
from llama_fn.model.cache import Cache, KeysValues
from llama_fn.model.quantized import GROUP, Grouped, Quantized, as_made
from llama_fn.model.rope import Rotation
from llama_fn.shapes import traced, transforms

# What was found of weights and a cache, for as long as they live.
_known: dict[Hashable, tuple[bool, list[weakref.ref]]] = {}


def one_token(blocks: tuple[Block, ...], x: Tensor, rotation: Rotation, cache: Cache | None, positions: Tensor | None,
              eps: float) -> Tensor | None:
    """What the last layer says of one token a row; keys and values are written to the cache that is given. None where
    this is not for the kernel: it takes numbers of which nothing is asked but values, and whose products are of few
    rows (see `avx2.takes`). Between layers nothing is rounded to x's dtype, but keys, values, and what products take.
    """
    if (type(x) is not Tensor or x.device.type != "cpu" or x.ndim < 2 or x.shape[-2] != 1 or not x.is_contiguous()
            or cache is None or not _values()):
        return None
    matrices, norms = [], []
    for weights in blocks:
        matrices += *weights.attention, *weights.feed_forward
        norms += weights.attention_norm, weights.ffn_norm
    values, scales = avx2.parts(matrices)
    leaves = [*values, *scales, *norms, *cache.k, *cache.v]
    if any(type(leaf) not in (Tensor, Parameter) for leaf in leaves):
        return None
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (*leaves, x)):
        return None

    def fit() -> bool:
        return all(_fits(weights, x, rotation, KeysValues(k, v), positions)
                   for weights, k, v in zip(blocks, cache.k, cache.v, strict=True))

    if not _once(fit, leaves, x.dtype, x.shape, positions.dtype, positions.shape):
        return None
    avx2.load()
    return torch.ops.llama_fn.one_token(x, *rotation, norms, values, scales, cache.k, cache.v, positions, eps,
                                         torch.get_num_threads())


def head(norm: Tensor, output: Any, x: Tensor, eps: float) -> Tensor | None:
    """`transformer.head` of few rows, by the same kernels, or None."""
    values, scales = avx2.parts([output])
    leaves = [*values, *scales, norm, x]
    if any(type(leaf) not in (Tensor, Parameter) for leaf in leaves) or not _values() or not x.is_contiguous():
        return None
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        return None
    made = _scaled([output]) and norm.dtype in avx2.FLOATS and norm.shape == x.shape[-1:] and norm.is_contiguous()
    if not made or not avx2.takes(output, x):
        return None
    avx2.load()
    return torch.ops.llama_fn.head(x, norm, values, scales, eps, torch.get_num_threads())


def _values() -> bool:
    """Whether values alone are asked for, by nobody who writes down what is computed."""
    return not traced() and not transforms() and not torch._C._is_any_autocast_enabled()


def _once(found: Callable[[], bool], leaves: list[Tensor], *rest: Hashable) -> bool:
    """What is found of these leaves, looked for once for as long as they live."""
    key = (*rest, *map(id, leaves))
    if (known := _known.get(key)) is None:
        def forget(_: Any) -> None:
            _known.pop(key, None)  # another may come to have its identity

        known = _known[key] = found(), [weakref.ref(leaf, forget) for leaf in leaves]
    return known[0]


def _scaled(weights: list[Any]) -> bool:
    """Whether the scales of 8-bit weights are as they were made: of a tree that was cast they may not be."""
    return all(weight.scale.dtype == torch.float32 and weight.scale.is_contiguous()
               for weight in weights if isinstance(weight, Quantized))


def _fits(params: Block, x: Tensor, rotation: Rotation, cache: KeysValues, positions: Tensor) -> bool:
    """Whether a layer's weights and cache have the kernel's dtypes and lie as it reads them."""
    matrices, norms = [*params.attention, *params.feed_forward], (params.attention_norm, params.ffn_norm)
    d, kind, integers = x.shape[-1], type(matrices[0]), isinstance(matrices[0], Quantized | Grouped)
    if integers:
        whole, numbers = GROUP, [part for matrix in matrices for part in matrix]
        made = (x.dtype in (torch.bfloat16, torch.float16) and all(type(m) is kind and as_made(m) for m in matrices)
                and _scaled(matrices))
    else:
        whole, numbers = 8, matrices
        made = all(isinstance(matrix, Tensor) and matrix.dtype == x.dtype in avx2.FLOATS for matrix in matrices)
    if not made or not avx2.level() or not all(leaf.is_contiguous() for leaf in (*numbers, *norms, *cache)):
        return False
    (*batch, k, _, h), (_, g, _, _), f = cache.k.shape, matrices[0].shape, matrices[4].shape[0]
    shapes = [(k, g, h, d), (k, h, d), (k, h, d), (d, k, g, h), (f, d), (f, d), (d, f), (d,), (d,), (*batch, 1, d)]
    return ([leaf.shape for leaf in (*matrices, *norms, x)] == shapes and cache.v.shape == cache.k.shape
            and positions.shape == (*batch, 1) and positions.dtype == torch.int64
            and all(part.shape == (*batch, 1, h // 2) and part.dtype == torch.float32 for part in rotation)
            and norms[0].dtype == norms[1].dtype in avx2.FLOATS and cache.k.dtype == cache.v.dtype in avx2.FLOATS
            and not (d % whole or k * g * h % whole or f % whole or h % 8)
            and 0 < x.numel() <= d * avx2.most(matrices[0]))
