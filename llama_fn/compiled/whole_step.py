"""All layers of a decode step at once: in C++ on a CPU (`ops/cpu`), in Triton on a GPU (`gpu_step.py`).

`block` after `block` is the definition. One call of the C++ kernel replaces hundreds from Python. Each layer's calls
from Python take 0.2 ms, because the weights that were just read have pushed Python's own data out of the processor's
cache.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from llama_fn.compiled.trace import alike
from llama_fn.config import Config
from llama_fn.model.block import Block
from llama_fn.model.cache import Cache
from llama_fn.model.rope import frequencies
from llama_fn.model.transformer import Params
from llama_fn.modes import plain, recording, values_alone
from llama_fn.ops.cpu import build
from llama_fn.ops.cpu import linear as cpu_linear
from llama_fn.ops.cpu.decode_layers import decode_head, decode_layers
from llama_fn.ops.gpu import linear as gpu_linear
from llama_fn.ops.quantized import GROUP, Grouped, Quantized, has_own_dtypes
from llama_fn.ops.slots import Forked
from llama_fn.ops.weight import is_divided

MAX_KINDS = 64  # kinds of arguments that a trunk remembers


class Checked(NamedTuple):
    """What was found of arguments of one kind: whether the kernels accept them, and RoPE's frequencies for them."""

    alike: Callable[..., bool]  # whether other tensors have the types, dtypes, devices, sizes and strides of these
    accepted: bool
    frequencies: Tensor | None  # None for what is not accepted, and where they cannot be kept


def fused_trunk() -> Callable[[Params, Tensor, Cache, int], Tensor | None]:
    """A `trunk` for `forward`: all layers of one token a row, or None for arguments that the kernels do not accept.

    The result is what the last layer gives. Keys and values are written to the cache that comes in, of which `slots`
    may be in use. On the CPU only keys, values and the inputs of products are rounded to 16 bits.

    To look at every weight takes 0.05 ms a layer, and to compute RoPE's frequencies as long as all norms. So the trunk
    keeps what it found of each kind of arguments, and uses it for arguments whose every tensor is alike.
    """
    known: dict[Hashable, Checked] = {}

    def trunk(params: Params, tokens: Tensor, cache: Cache, slots: int) -> Tensor | None:
        if tokens.shape[-1] != 1 or not values_alone() or isinstance(cache.k[0], Forked):
            return None
        if is_divided(params.norm):  # the kernels do not send what the devices send to each other
            return None
        matrices, norms = [], []
        for weights in params.blocks:
            matrices += *weights.attention, *weights.feed_forward
            norms += weights.attention_norm, weights.ffn_norm
        values, scales = cpu_linear.values_and_scales(matrices)
        tensors = [tokens, cache.length, params.embedding, *values, *scales, *norms, *cache.k, *cache.v]
        config = params.config
        kind = (tokens.shape, cache.k[0].shape, cache.k[0].dtype, params.norm.dtype, config.head_dim,
                config.rope_theta, config.rope_scaling, *map(type, matrices))
        found = known.get(kind)
        if found is None or not found.alike(*tensors):
            if not plain(tensors):
                return None
            found = _checked(params, tokens, cache, tensors)
            if len(known) >= MAX_KINDS:
                known.pop(next(iter(known)), None)
            known[kind] = found
        if not found.accepted:
            return None
        angles = found.frequencies
        if angles is None:
            angles = _frequencies(config, tokens.device)
        if tokens.is_cuda:
            from llama_fn.compiled import gpu_step  # it imports Triton, which is there only where a GPU is

            with torch.cuda.device(tokens.device):  # Triton launches on the current device
                return gpu_step.fused_trunk(params, tokens, cache, slots, angles)
        return decode_layers(tokens.long().contiguous(), params.embedding, angles, norms, values, scales, cache.k,
                             cache.v, cache.length.contiguous(), config.norm_eps)

    return trunk


def fused_head(norm: Tensor, output: Any, x: Tensor, eps: float) -> Tensor | None:
    """`transformer.head` of few rows in C++, or None for arguments that the kernel does not accept."""
    if is_divided(output):
        return None
    values, scales = cpu_linear.values_and_scales([output])
    tensors = [*values, *scales, norm, x]
    if not values_alone() or not plain(tensors) or not x.is_contiguous():
        return None
    made = _scales_are_float32([output]) and norm.dtype in build.DTYPES and norm.is_contiguous()
    made = made and output.shape[-1:] == norm.shape == x.shape[-1:] and x.device == norm.device == values[0].device
    if not made or not cpu_linear.supports(output, x):
        return None
    return decode_head(x, norm, values, scales, eps)


def _checked(params: Params, tokens: Tensor, cache: Cache, tensors: list[Tensor]) -> Checked:
    kinds = {(type(weights.attention.wq), weights.attention_norm.dtype) for weights in params.blocks}
    leaves = cast(tuple[Tensor, ...], (*cache.k, *cache.v))
    accepted = (
        len(kinds) == 1 and len({leaf.dtype for leaf in leaves}) == 1
        and tokens.device == cache.length.device == params.embedding.device and cache.length.dtype == torch.int64
        and all(_accepted(weights, params.embedding, tokens.shape[:-1], k, v)
                for weights, k, v in zip(params.blocks, cache.k, cache.v, strict=True)))
    angles = _frequencies(params.config, tokens.device) if accepted else None
    # Of a fake tensor, or of one that a CUDA graph will only compute when it is replayed, nothing can be kept.
    if angles is not None and (type(angles) is not Tensor or recording(angles)):
        angles = None
    return Checked(alike(tensors), accepted, angles)


def _frequencies(config: Config, device: torch.device) -> Tensor:
    return frequencies(config.head_dim, config.rope_theta, config.rope_scaling, device)


def _scales_are_float32(weights: list[Any]) -> bool:
    """Whether the scales of 8-bit weights are float32 and contiguous. After a cast of the tree they may not be."""
    return all(weight.scale.dtype == torch.float32 and weight.scale.is_contiguous()
               for weight in weights if isinstance(weight, Quantized))


def _accepted(params: Block, embedding: Tensor, batch: torch.Size, keys: Any, values: Any) -> bool:
    """Whether the kernels accept one layer's weights and cache: those for every device, and those of this one."""
    matrices, norms = [*params.attention, *params.feed_forward], (params.attention_norm, params.ffn_norm)
    d, dtype, kind, numbers = embedding.shape[-1], embedding.dtype, type(matrices[0]), matrices
    if isinstance(matrices[0], Quantized | Grouped):
        numbers = [part for matrix in matrices for part in matrix]
        made = all(type(m) is kind and has_own_dtypes(cast(Quantized, m)) for m in matrices)
        made = made and _scales_are_float32(matrices) and dtype.itemsize == 2
    else:
        made = all(isinstance(matrix, Tensor) and matrix.dtype == dtype for matrix in matrices)
    leaves = (embedding, *numbers, *norms, keys, values)
    if not made or not all(leaf.is_contiguous() and leaf.device == embedding.device for leaf in leaves):
        return False
    (k, g, h, _), f, room = matrices[0].shape, matrices[4].shape[0], keys.shape[-2]
    shapes = [(k, g, h, d), (k, h, d), (k, h, d), (d, k, g, h), (f, d), (f, d), (d, f), (d,), (d,)]
    if ([leaf.shape for leaf in (*matrices, *norms)] != shapes or norms[0].dtype != norms[1].dtype
            or any(leaf.shape != (*batch, k, room, h) or leaf.dtype != keys.dtype for leaf in (keys, values))):
        return False
    if embedding.is_cuda:
        return (kind is not Grouped and 0 < batch.numel() <= gpu_linear.max_rows(matrices[0])
                and norms[0].dtype == keys.dtype == dtype in (torch.bfloat16, torch.float16))
    whole = GROUP if numbers is not matrices else 8
    return (embedding.device.type == "cpu" and bool(build.vector_instructions())
            and not (d % whole or k * g * h % whole or f % whole or h % 8)
            and all(each in build.DTYPES for each in (dtype, norms[0].dtype, keys.dtype))
            and 0 < batch.numel() <= cpu_linear.max_rows(matrices[0]))
