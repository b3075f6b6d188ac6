"""One layer of the transformer: attention, then feed-forward, each on a norm and added to what came in."""

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
    """The parameters of one layer."""

    attention_norm: Float[Vector, "d"]
    attention: Attention
    ffn_norm: Float[Vector, "d"]
    feed_forward: FeedForward


@typed
def block(params: Block, x: Float[Tensor, "*b t d"], rotation: Rotation, cache: AnyKeysValues | None,
          positions: Int[Tensor, "*b t"] | None, slots: Int[Tensor, "_"] | None,
          eps: float) -> tuple[Float[Tensor, "*b t d"], AnyKeysValues]:
    """x + attention(norm x), then x + feed_forward(norm x). The other arguments are those of `attention`."""
    seen, cache = attention(params.attention, rms_norm(params.attention_norm, x, eps), rotation, cache,
                            positions, slots)
    x = x + seen
    return x + feed_forward(params.feed_forward, rms_norm(params.ffn_norm, x, eps)), cache
