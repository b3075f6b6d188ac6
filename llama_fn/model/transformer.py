"""The model: `forward` over a tree of parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.config import Config
from llama_fn.model.block import Block, block
from llama_fn.model.cache import AnyCache, Cache, KeysValues, NoCache
from llama_fn.model.checks import check_sizes, check_tokens
from llama_fn.model.linear import linear
from llama_fn.model.norm import rms_norm
from llama_fn.model.rope import rotation
from llama_fn.ops.extent import extent, grown
from llama_fn.ops.look_up import look_up
from llama_fn.ops.room import check_room, slots_to_read
from llama_fn.ops.weight import Matrix, Table, Vector
from llama_fn.shapes import typed


class Params(NamedTuple):
    """All weights of a model, as plain tensors in a tree, and its `Config`, which has no leaves.

    So ``torch.func.grad`` differentiates with respect to them, and `lf.tree.map` changes them.

    >>> rounded: lf.Params = lf.tree.map(lambda x: x.bfloat16(), params)
    """

    embedding: Float[Table, "v d"]
    blocks: tuple[Block, ...]
    norm: Float[Vector, "d"]
    output: Float[Matrix, "v d"]
    config: Config


@typed
def embed(weight: Float[Table, "v d"], tokens: Int[Tensor, "*b t"]) -> Float[Tensor, "*b t d"]:
    """Each token's row of the weight, weight[token]."""
    return look_up(weight, tokens) if isinstance(weight, Tensor) else weight.look_up(tokens)


@typed
def head(norm: Float[Vector, "d"], output: Float[Matrix, "v d"], x: Float[Tensor, "*b t d"],
         eps: float) -> Float[Tensor, "*b t v"]:
    """The logits, output (norm x), of the last layer's result x; ``eps`` is the norm's epsilon.

    Raises `AxesError` if the axes do not match.

    >>> logits = lf.head(params.norm, params.output, x, params.config.norm_eps)
    """
    return linear(output, rms_norm(norm, x, eps))


@typed
def forward(params: Params, tokens: Int[Tensor, "*b t"], cache: AnyCache | None = None,
            *, segments: Int[Tensor, "*b t"] | None = None, layer: Callable[..., Any] = block,
            head: Callable[..., Any] = head,
            trunk: Callable[..., Tensor | None] | None = None) -> tuple[Float[Tensor, "*b t v"], AnyCache]:
    """For each token, the logits of the next one; and the cache with these tokens in it (Touvron et al. 2023).

    Without a cache, the tokens are whole sequences from position 0 on, and the second result is `NoCache`. With one,
    they continue each row at its own length. The old cache is not changed, so it can be continued again. Positions may
    exceed ``config.max_seq_len``, the context of training; most models predict worse there. With ``segments``, a token
    attends only within its segment, where positions start at 0: a document's logits are as if it were alone.

    ``layer`` replaces `block`, and ``head`` computes the logits. ``trunk(params, tokens, cache, slots)`` computes all
    layers at once and writes into the memory of the cache, or returns None. `jit_layers` passes all three.

    Raises `ValueError` for segments with a cache, for no tokens, for a token outside the vocabulary, and for more
    tokens than the cache has room for, also when compiled or mapped. A donated cache is then unchanged. Where nothing
    can read the numbers before use (``ops/inside.py`` says where), the logits of such a token or row are NaN instead.

    >>> logits, cache = lf.forward(params, tokens, cache)
    """
    x, new_cache = _layers(params, tokens, cache, segments, layer, trunk)
    return head(params.norm, params.output, x, params.config.norm_eps), new_cache


@typed
def trunk(params: Params, tokens: Int[Tensor, "*b t"], cache: AnyCache | None = None,
          *, segments: Int[Tensor, "*b t"] | None = None, layer: Callable[..., Any] = block,
          trunk: Callable[..., Tensor | None] | None = None) -> tuple[Float[Tensor, "*b t d"], AnyCache]:
    """`forward` without its head: the last layer's results, and the cache. Arguments and errors are those of `forward`.

    For the logits after a long prompt, apply `head` to the last token alone.

    >>> x, cache = lf.trunk(params, tokens, cache)
    """
    return _layers(params, tokens, cache, segments, layer, trunk)


def _layers(params: Params, tokens: Tensor, cache: Cache | NoCache | None, segments: Tensor | None, layer: Callable,
            trunk: Callable | None) -> tuple[Tensor, Any]:
    config, count = params.config, tokens.shape[-1]
    tokens = check_tokens(tokens, config.vocab_size)
    check_sizes(params, cache, segments)
    start, slots, known = 0, None, None
    if isinstance(cache, Cache):
        known = extent(cache.length)
        cache = cache._replace(length=check_room(cache.k[0], cache.length, known, count, tokens))
        room = slots_to_read(cache.k[0], known, count)
        if trunk is not None and (x := trunk(params, tokens, cache, room)) is not None:
            return x, cache._replace(length=grown(cache.length, known, count))
        start, slots = cache.length[..., None], torch.arange(room, device=tokens.device)
    positions, own = start + torch.arange(count, device=tokens.device), ()
    if segments is not None:
        positions, own = (segments[..., None] == segments[..., None, :]).tril(-1).sum(-1), (segments,)
    angles = rotation(positions.expand(tokens.shape), config.head_dim, config.rope_theta, config.rope_scaling)

    x = embed(params.embedding, tokens)
    new = []
    for i, weights in enumerate(params.blocks):
        old = KeysValues(cache.k[i], cache.v[i]) if isinstance(cache, Cache) else NoCache()
        x, keys_values = layer(weights, x, angles, old, positions if cache else None, slots, config.norm_eps, *own)
        new.append(keys_values)

    if not isinstance(cache, Cache):
        return x, NoCache()
    k, v = zip(*new, strict=True)
    return x, Cache(k, v, grown(cache.length, known, count))
