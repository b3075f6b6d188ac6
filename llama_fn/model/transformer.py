"""The model: `forward` over a tree of parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.config import Config
from llama_fn.model.block import Block, block
from llama_fn.model.cache import AnyCache, Cache, KeysValues, NoCache
from llama_fn.model.checks import check_sizes, check_tokens
from llama_fn.model.linear import linear
from llama_fn.model.norm import rms_norm
from llama_fn.model.room import check_room, reach
from llama_fn.model.rope import rotation
from llama_fn.modes import unread
from llama_fn.ops.extent import grown
from llama_fn.ops.inside import held
from llama_fn.ops.weight import Matrix, Table, Vector
from llama_fn.shapes import typed


class Params(NamedTuple):
    """All weights of a model, and its config, which has no leaves. Plain tensors: `torch.func` differentiates them."""

    embedding: Float[Table, "v d"]
    blocks: tuple[Block, ...]
    norm: Float[Vector, "d"]
    output: Float[Matrix, "v d"]
    config: Config


@typed
def head(norm: Float[Vector, "d"], output: Float[Matrix, "v d"], x: Float[Tensor, "*b t d"],
         eps: float) -> Float[Tensor, "*b t v"]:
    """The logits of what the last layer says: output (norm x)."""
    return linear(output, rms_norm(norm, x, eps))


@typed
def forward(params: Params, tokens: Int[Tensor, "*b t"], cache: AnyCache | None = None,
            *, layer: Callable[..., Any] = block, head: Callable[..., Any] = head,
            trunk: Callable[..., Tensor | None] | None = None) -> tuple[Float[Tensor, "*b t v"], AnyCache]:
    """The logits of the token after each token, and the cache with these tokens in it.

    Without a cache the tokens are whole sequences, starting at position 0, and the second result is `NoCache()`, which
    may be passed in again. With one, they continue each row at its own `cache.length`. Nothing is changed: the cache
    that was passed in can be continued again, otherwise.

    RoPE is defined at every position. So `config.max_seq_len`, the context that the model was trained for, is no limit
    here, with a cache or without one: beyond it the numbers are those of the formula, and most models write worse. What
    generates and scores text keeps within it.

    `layer` is what computes each layer: `block`, or a transform of it, as `layer=lf.remat(lf.block)`; `head` is what
    computes the logits. `trunk(params, tokens, cache, slots)` computes all layers at once in the memory of the cache
    that it is given, or gives None for what it cannot do. `jit_layers` hands all three.

    Raises `ValueError` for no tokens, for a token outside the vocabulary, and for more tokens than the cache has room
    for, compiled and mapped too; a cache that was donated is then what it was. The last two are not seen where a GPU
    would have to be waited for (compiled, mapped or replayed there), and in an exported program: the logits of such a
    token, or of a row without room, are NaN.
    """
    x, cache = _layers(params, tokens, cache, layer, trunk)
    return head(params.norm, params.output, x, params.config.norm_eps), cache


@typed
def trunk(params: Params, tokens: Int[Tensor, "*b t"], cache: AnyCache | None = None,
          *, layer: Callable[..., Any] = block,
          trunk: Callable[..., Tensor | None] | None = None) -> tuple[Float[Tensor, "*b t d"], AnyCache]:
    """`forward` without the head: what the last layer says of each token. Of a long prompt, the logits after its last
    token are `head` of the last of these alone.
    """
    return _layers(params, tokens, cache, layer, trunk)


def _layers(params: Params, tokens: Tensor, cache: Cache | NoCache | None,
            layer: Callable, trunk: Callable | None) -> tuple[Tensor, Cache | NoCache]:
    config, count = params.config, tokens.shape[-1]
    tokens = check_tokens(tokens, config.vocab_size)
    check_sizes(params, cache)
    start, slots = 0, None
    if cache:
        cache = check_room(cache, count, tokens)
        room = reach(cache, count)
        if trunk is not None and (x := trunk(params, tokens, cache, room)) is not None:
            return x, cache._replace(length=grown(cache.length, count))
        start, slots = cache.length[..., None], torch.arange(room, device=tokens.device)
    positions = start + torch.arange(count, device=tokens.device)
    angles = rotation(positions.expand(tokens.shape), config.head_dim, config.rope_theta, config.rope_scaling)

    x = embed(params.embedding, tokens)
    layers = []
    for i, weights in enumerate(params.blocks):
        old = KeysValues(cache.k[i], cache.v[i]) if cache else NoCache()
        x, new = layer(weights, x, angles, old, positions if cache else None, slots, config.norm_eps)
        layers.append(new)

    if not cache:
        return x, NoCache()
    k, v = zip(*layers, strict=True)
    return x, Cache(k, v, grown(cache.length, count))


@typed
def embed(weight: Float[Table, "v d"], tokens: Int[Tensor, "*b t"]) -> Float[Tensor, "*b t d"]:
    """Each token's row of the weight; for a number outside that nothing read (see `ops/inside.py`), NaN."""
    if not isinstance(weight, Tensor):
        return weight.look_up(tokens)
    if unread(tokens):  # a GPU stops for good at a row that is not there
        index, outside = held(tokens, 0, len(weight))
        return F.embedding(index.long(), weight).masked_fill(outside[..., None], torch.nan)
    return F.embedding(tokens.long(), weight)  # indexed, inductor's forward-over-reverse is wrong (torch 2.13)
