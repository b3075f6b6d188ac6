"""All layers of a decode step on a GPU, in a few kernels a layer. `block` after `block` is the definition.

As kernels of their own, a norm, a rotation or an addition would each take 1 to 3 us in which no weight is read. So they
are the epilogues of products. With one row, a product also rotates queries and keys and writes to the cache, and its
last programs prefetch the first weights of the next product.
"""

import math
from typing import cast

import triton
import triton.language as tl
from torch import Tensor

from llama_fn.model.cache import Cache
from llama_fn.model.transformer import Params
from llama_fn.ops.gpu.attend_heads import MANY_HEADS, attended
from llama_fn.ops.gpu.epilogues import added, gated, normed, rotated
from llama_fn.ops.gpu.flash_decoding import flash_decoding
from llama_fn.ops.gpu.linear_few_rows import Weights
from llama_fn.ops.gpu.linear_one_row import Rotated
from llama_fn.ops.quantized import Quantized


def fused_trunk(params: Params, tokens: Tensor, cache: Cache, slots: int, frequencies: Tensor) -> Tensor:
    """What the last layer gives for one token a row; keys and values are written to the cache.

    The first `slots` of the cache are attended to. Numbers are rounded where `block` rounds them, except within a
    rotation and within a gate. `frequencies` are those of `rope.frequencies`.
    """
    blocks, eps, positions = params.blocks, params.config.norm_eps, cache.length.reshape(-1).contiguous()
    x, cos, sin = begin(params, tokens.reshape(-1).contiguous(), positions, frequencies)
    d, y = x.shape[1], normed(blocks[0].attention_norm, x, eps)
    for weights, after, *leaves in zip(blocks, [*blocks[1:], None], cache.k, cache.v, strict=True):
        (wq, wk, wv, wo), (gate, up, down) = weights.attention, weights.feed_forward
        output, gate_up = _flat(math.prod(wo.shape[1:]), wo), _flat(d, gate, up)
        down_weights = _flat(gate.shape[0], down)
        next_weights, norm = (None, None) if after is None else (_flat(d, after.attention.wq), after.attention_norm)
        k, v = (leaf.view(-1, *leaf.shape[-3:]) for leaf in cast(list[Tensor], leaves))
        inputs, rotation = _flat(d, wq, wk, wv), Rotated(cos, sin, k, v, positions)
        if len(x) > 1 and wq.shape[1] == 1 and len(x) * k.shape[1] >= MANY_HEADS:
            heads = attended(inputs, y, rotation, slots)
        else:
            queries = rotated(inputs, y, rotation, output).view(len(x), k.shape[1], -1, k.shape[3])
            heads = flash_decoding(queries, k[:, :, :slots], v[:, :, :slots], positions)
        x, y = added(output, heads.view(len(x), -1), x, weights.ffn_norm, eps, gate_up)
        x, y = added(down_weights, gated(gate_up, y, down_weights), x, norm, eps, next_weights)
    return x.view(*tokens.shape, -1)


def _flat(inputs: int, *weights: Tensor | Quantized) -> Weights:
    """Weights of one kind, as matrices with rows of `inputs` numbers."""
    values = [weight.values if isinstance(weight, Quantized) else weight for weight in weights]
    return Weights([value.view(-1, inputs) for value in values],
                   [weight.scale.view(-1) for weight in weights if isinstance(weight, Quantized)])


def begin(params: Params, tokens: Tensor, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`transformer.embed` of tokens "b", NaN for one outside, and the `rope.Rotation` of their positions."""
    rows, (v, d), pairs = len(tokens), params.embedding.shape, len(frequencies)
    x = params.embedding.new_empty((rows, d))
    cos, sin = (frequencies.new_empty((rows, pairs)) for _ in range(2))
    _begin[rows,](params.embedding, tokens, positions, frequencies, x, cos, sin, v, d, pairs,
                  triton.next_power_of_2(d), triton.next_power_of_2(pairs), num_warps=4)  # pyright: ignore[reportCallIssue]  # Triton's
    return x, cos, sin


@triton.jit
def _begin(embedding, tokens, positions, frequencies, x, cos, sin, v, d, p, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    row, k, pair = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, PAIRS)
    token, position = tl.load(tokens + row).to(tl.int64), tl.load(positions + row).to(tl.float32)
    inside = (token >= 0) & (token < v)
    numbers = tl.load(embedding + token * d + k, mask=inside & (k < d), other=float("nan"))
    tl.store(x + row * d + k, numbers, mask=k < d)
    angles = position * tl.load(frequencies + pair, mask=pair < p, other=0)
    tl.store(cos + row * p + pair, tl.cos(angles), mask=pair < p)
    tl.store(sin + row * p + pair, tl.sin(angles), mask=pair < p)
