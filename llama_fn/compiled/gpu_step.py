"""All layers of one token on a GPU, a few kernels each, beside the definition: `block` after `block`.

By itself, a norm, a rotation or a sum is a small kernel of 1 to 3 us, in which no weight is read. Of one row a product
turns queries and keys and writes to the cache, and its last programs ask for the first weights of the next.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from llama_fn.compiled.angles import known_frequencies
from llama_fn.model.cache import Cache
from llama_fn.model.transformer import Params
from llama_fn.ops.gpu.attend import attention
from llama_fn.ops.gpu.attend_heads import MANY, attended
from llama_fn.ops.gpu.epilogues import added, gated, normed, rotated
from llama_fn.ops.gpu.linear_few_rows import Weights
from llama_fn.ops.gpu.linear_one_row import Rotated
from llama_fn.ops.quantized import Quantized


def one_token(params: Params, tokens: Tensor, cache: Cache, slots: int) -> Tensor:
    """What the last layer says of one token a row, whose keys and values are written to the cache; its first `slots`
    are attended to. Rounded where `block` rounds, but for the inner steps of a rotation and a gate.
    """
    blocks, eps, positions = params.blocks, params.config.norm_eps, cache.length.reshape(-1).contiguous()
    x, cos, sin = begin(params, tokens.reshape(-1).contiguous(), positions)
    d, y = x.shape[1], normed(blocks[0].attention_norm, x, eps)
    for weights, after, *leaves in zip(blocks, [*blocks[1:], None], cache.k, cache.v, strict=True):
        (wq, wk, wv, wo), (gate, up, down) = weights.attention, weights.feed_forward
        output, gates, last = _flat(math.prod(wo.shape[1:]), wo), _flat(d, gate, up), _flat(gate.shape[0], down)
        following, norm = (None, None) if after is None else (_flat(d, after.attention.wq), after.attention_norm)
        k, v = (leaf.view(-1, *leaf.shape[-3:]) for leaf in leaves)
        inputs, places = _flat(d, wq, wk, wv), Rotated(cos, sin, k, v, positions)
        if len(x) > 1 and wq.shape[1] == 1 and len(x) * k.shape[1] >= MANY:
            heads = attended(inputs, y, places, slots)
        else:
            queries = rotated(inputs, y, places, output).view(len(x), k.shape[1], -1, k.shape[3])
            heads = attention(queries, k[:, :, :slots], v[:, :, :slots], positions)
        x, y = added(output, heads.view(len(x), -1), x, weights.ffn_norm, eps, gates)
        x, y = added(last, gated(gates, y, last), x, norm, eps, following)
    return x.view(*tokens.shape, -1)


def _flat(inputs: int, *weights: Tensor | Quantized) -> Weights:
    """Weights of one kind, as matrices."""
    values = [weight.values if isinstance(weight, Quantized) else weight for weight in weights]
    return Weights([value.view(-1, inputs) for value in values],
                   [weight.scale.view(-1) for weight in weights if isinstance(weight, Quantized)])


def begin(params: Params, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`transformer.embed` of tokens "b", NaN for one outside, and the `rope.Rotation` of their positions."""
    config, rows, (v, d) = params.config, len(tokens), params.embedding.shape
    turns = known_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, tokens.device)
    x = params.embedding.new_empty((rows, d))
    cos, sin = (turns.new_empty((rows, len(turns))) for _ in range(2))
    _begin[rows,](params.embedding, tokens, positions, turns, x, cos, sin, v, d, len(turns),
                  triton.next_power_of_2(d), triton.next_power_of_2(len(turns)), num_warps=4)
    return x, cos, sin


@triton.jit
def _begin(embedding, tokens, positions, turns, x, cos, sin, v, d, p, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    row, k, pair = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, PAIRS)
    token, position = tl.load(tokens + row).to(tl.int64), tl.load(positions + row).to(tl.float32)
    inside = (token >= 0) & (token < v)
    numbers = tl.load(embedding + token * d + k, mask=inside & (k < d), other=float("nan"))
    tl.store(x + row * d + k, numbers, mask=k < d)
    angles = position * tl.load(turns + pair, mask=pair < p, other=0)
    tl.store(cos + row * p + pair, tl.cos(angles), mask=pair < p)
    tl.store(sin + row * p + pair, tl.sin(angles), mask=pair < p)
