"""All layers of one token a row, beside the definition, `block` after `block`: on the CPU by a kernel in C++
(`ops/cpu/step.cpp`), on a GPU by those that `gpu_step.py` calls.

To call a layer's kernels one by one takes Python 0.2 ms a layer: what it knows of a tensor has left the processor's
cache when the weights have gone through it.
"""

import operator
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from llama_fn.compiled.angles import known_frequencies
from llama_fn.model.block import Block
from llama_fn.model.cache import Cache, KeysValues
from llama_fn.model.transformer import Params
from llama_fn.modes import traced, transforms
from llama_fn.ops.cpu import build as avx2
from llama_fn.ops.gpu.linear import most_by_triton
from llama_fn.ops.quantized import GROUP, Grouped, Quantized, as_made
from llama_fn.private import autocast

# What was found of weights and a cache, for as long as they live.
_known: dict[Hashable, tuple[bool, list[weakref.ref]]] = {}


def one_token(params: Params, tokens: Tensor, cache: Cache, slots: int) -> Tensor | None:
    """What the last layer says of one token a row; keys and values are written to the cache that is given, of which
    `slots` may be in use. None where this is not for a kernel: those take numbers of which nothing is asked but values,
    and few rows. On the CPU nothing is rounded to 16 bits between layers, but keys, values, and what products take.
    """
    if tokens.shape[-1] != 1 or not _values():
        return None
    matrices, norms = [], []
    for weights in params.blocks:
        matrices += *weights.attention, *weights.feed_forward
        norms += weights.attention_norm, weights.ffn_norm
    values, scales = avx2.parts(matrices)
    leaves = [params.embedding, *values, *scales, *norms, *cache.k, *cache.v]
    if not _numbers(leaves):
        return None

    def fit() -> bool:
        kinds = {(type(weights.attention.wq), weights.attention_norm.dtype) for weights in params.blocks}
        kept = {leaf.dtype for leaf in (*cache.k, *cache.v)}
        return len(kinds) == len(kept) == 1 and all(
            _fits(weights, params.embedding, tokens.shape[:-1], KeysValues(k, v))
            for weights, k, v in zip(params.blocks, cache.k, cache.v, strict=True))

    here = tokens.device == cache.length.device == params.embedding.device
    if not here or cache.length.dtype != torch.int64 or not _once(fit, leaves, tokens.shape):
        return None
    if tokens.is_cuda:
        from llama_fn.compiled import gpu_step as gpu_token  # it imports triton, which is only where there is a GPU

        with torch.cuda.device(tokens.device):  # where triton launches
            return gpu_token.one_token(params, tokens, cache, slots)
    config = params.config
    turns = known_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, tokens.device)
    avx2.load()
    return torch.ops.llama_fn.one_token(
        tokens.long().contiguous(), params.embedding, turns, norms, values, scales, cache.k, cache.v,
        cache.length.contiguous(), config.norm_eps, torch.get_num_threads())


def head(norm: Tensor, output: Any, x: Tensor, eps: float) -> Tensor | None:
    """`transformer.head` of few rows, by the same kernels, or None."""
    values, scales = avx2.parts([output])
    leaves = [*values, *scales, norm, x]
    if not _numbers(leaves) or not _values() or not x.is_contiguous():
        return None
    made = _scaled([output]) and norm.dtype in avx2.FLOATS and norm.shape == x.shape[-1:] and norm.is_contiguous()
    made = made and output.shape[-1:] == norm.shape and x.device == norm.device == values[0].device
    if not made or not avx2.takes(output, x):
        return None
    avx2.load()
    return torch.ops.llama_fn.head(x, norm, values, scales, eps, torch.get_num_threads())


def _numbers(leaves: list[Any]) -> bool:
    """Whether these are tensors, of which no gradient is asked."""
    return set(map(type, leaves)) <= {Tensor, Parameter} and not (torch.is_grad_enabled() and any(
        map(operator.attrgetter("requires_grad"), leaves)))


def _values() -> bool:
    """Whether values alone are asked for, by nobody who writes down what is computed."""
    return not traced() and not transforms() and not autocast()


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


def _fits(params: Block, embedding: Tensor, batch: torch.Size, cache: KeysValues) -> bool:
    """Whether a layer's weights and cache are as all of these kernels read them, and as those of their device do."""
    matrices, norms = [*params.attention, *params.feed_forward], (params.attention_norm, params.ffn_norm)
    d, dtype, kind, numbers = embedding.shape[-1], embedding.dtype, type(matrices[0]), matrices
    if isinstance(matrices[0], Quantized | Grouped):
        numbers = [part for matrix in matrices for part in matrix]
        made = all(type(m) is kind and as_made(m) for m in matrices) and _scaled(matrices) and dtype.itemsize == 2
    else:
        made = all(isinstance(matrix, Tensor) and matrix.dtype == dtype for matrix in matrices)
    leaves = (embedding, *numbers, *norms, *cache)
    if not made or not all(leaf.is_contiguous() and leaf.device == embedding.device for leaf in leaves):
        return False
    (k, g, h, _), f, room = matrices[0].shape, matrices[4].shape[0], cache.k.shape[-2]
    shapes = [(k, g, h, d), (k, h, d), (k, h, d), (d, k, g, h), (f, d), (f, d), (d, f), (d,), (d,)]
    if ([leaf.shape for leaf in (*matrices, *norms)] != shapes or norms[0].dtype != norms[1].dtype
            or any(leaf.shape != (*batch, k, room, h) or leaf.dtype != cache.k.dtype for leaf in cache)):
        return False
    if embedding.is_cuda:
        return (kind is not Grouped and 0 < batch.numel() <= most_by_triton(matrices[0])
                and norms[0].dtype == cache.k.dtype == dtype in (torch.bfloat16, torch.float16))
    whole = GROUP if numbers is not matrices else 8
    return (embedding.device.type == "cpu" and bool(avx2.level())
            and not (d % whole or k * g * h % whole or f % whole or h % 8)
            and all(each in avx2.FLOATS for each in (dtype, norms[0].dtype, cache.k.dtype))
            and 0 < batch.numel() <= avx2.most(matrices[0]))
