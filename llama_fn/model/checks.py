"""What `forward` checks before the first layer: the tokens, and that config, weights and cache fit together."""

from typing import TYPE_CHECKING

from torch import Tensor

from llama_fn.model.cache import Cache, NoCache
from llama_fn.ops.inside import inside
from llama_fn.ops.weight import whole_shape

if TYPE_CHECKING:
    from llama_fn.model.transformer import Params


def check_sizes(params: "Params", cache: Cache | NoCache | None, segments: Tensor | None) -> None:
    """Raise `ValueError` where config, weights, cache and segments do not fit together."""
    if isinstance(cache, Cache) and segments is not None:
        raise ValueError("segments divide whole rows, which begin at position 0; call without the cache")
    config, (v, d) = params.config, whole_shape(params.embedding)
    if (v, d) != (config.vocab_size, config.dim):
        raise ValueError(f"the config says {config.vocab_size} tokens and width {config.dim}, the weights {v} and {d}")
    for layer in params.blocks[:1]:
        k, g, h, _ = whole_shape(layer.attention.wq)
        if (k, g, h) != (config.n_kv_heads, config.group_size, config.head_dim):
            raise ValueError(f"the config says {config.n_heads} heads on {config.n_kv_heads} key/value heads of width "
                             f"{config.head_dim}, the weights {k * g} on {k} of width {h}")
    if isinstance(cache, Cache) and not len(cache.k) == len(cache.v) == len(params.blocks):
        raise ValueError(f"the cache has keys of {len(cache.k)} layers and values of {len(cache.v)}, the weights "
                         f"have {len(params.blocks)}; make it with init_cache from the same config")


def check_tokens(tokens: Tensor, vocab_size: int) -> Tensor:
    """Return the tokens. Raise `ValueError` for no tokens, and for one outside the vocabulary (see `ops/inside.py`)."""
    if tokens.shape[-1] == 0:
        raise ValueError("there are no tokens (an empty prompt): begin a text with the tokenizer's bos_id")
    return inside(tokens, "token", 0, vocab_size)
