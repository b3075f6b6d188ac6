"""One layer of the transformer: attention, then the feed-forward, each of a norm and each added to its input."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.model.attention import Attention, attention
from llama_fn.model.cache import AnyKeysValues
from llama_fn.model.feedforward import FeedForward, feed_forward
from llama_fn.model.norm import rms_norm
from llama_fn.model.rope import Rotation
from llama_fn.ops.weight import Vector
from llama_fn.shapes import typed


class Block(NamedTuple):
    """The parameters of one layer; the layers of a model are ``params.blocks``.

    >>> first: lf.Block = params.blocks[0]
    """

    attention_norm: Float[Vector, "d"]
    attention: Attention
    ffn_norm: Float[Vector, "d"]
    feed_forward: FeedForward


@typed
def block(params: Block, x: Float[Tensor, "*b t d"], rotation: Rotation, cache: AnyKeysValues | None,
          positions: Int[Tensor, "*b t"] | None, slots: Int[Tensor, "_"] | None, eps: float,
          segments: Int[Tensor, "*b t"] | None = None) -> tuple[Float[Tensor, "*b t d"], AnyKeysValues]:
    """One layer: x + attention(norm x), then x + feed_forward(norm x) (Touvron et al. 2023, section 2.2).

    ``rotation`` is RoPE's, ``eps`` the norms' epsilon. With a cache, ``cache`` is this layer's part of it,
    ``positions`` are the slots of the tokens, and ``slots`` are the slots that are read; without one, all three are
    None, and ``segments`` may be given. The second result is the layer's new cache, or `NoCache`. Raises `AxesError`.

    >>> logits, _ = lf.forward(params, tokens, layer=lf.remat(lf.block))
    """
    attended, new_cache = attention(params.attention, rms_norm(params.attention_norm, x, eps), rotation, cache,
                                    positions, slots, segments)
    x = x + attended
    return x + feed_forward(params.feed_forward, rms_norm(params.ffn_norm, x, eps)), new_cache
