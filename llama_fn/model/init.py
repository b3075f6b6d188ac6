"""The abstract tree, every weight's shape, axes and scale without a number in it, and the parameters drawn from it."""

import math
from dataclasses import dataclass

import torch

from llama_fn import random, tree
from llama_fn.config import Config
from llama_fn.model.attention import Attention
from llama_fn.model.block import Block
from llama_fn.model.feedforward import FeedForward
from llama_fn.model.transformer import Params
from llama_fn.random import Key
from llama_fn.shapes import typed


@dataclass(frozen=True)
class Weight:
    """One leaf of the abstract tree: `axes` name the `shape`; `std` is the initial deviation, None for all ones."""

    axes: str
    shape: tuple[int, ...]
    std: float | None

    @property
    def inner(self) -> tuple[int, ...]:
        """Of a matrix, the axes that it sums over: the last, or all heads of `wo`."""
        return self.shape[-1:] if self.axes.endswith("d") else self.shape[1:]

    @property
    def outer(self) -> tuple[int, ...]:
        """Of a matrix, the axes of what it makes."""
        return self.shape[:-len(self.inner)]


def abstract_params(config: Config) -> Params:
    """The tree of `Weight`s of a config: it drives the drawing, checking, loading and saving of parameters.

    The deviations are sqrt(2 / 5d), and 2 / (l sqrt(d)) for the two matrices that write to the residual stream, so that
    its variance does not grow with depth (Nguyen and Salazar 2019; Wang and Komatsuzaki 2021, as in GPT-NeoX).
    """
    sizes = {"k": config.n_kv_heads, "g": config.group_size, "h": config.head_dim, "d": config.dim,
             "f": config.hidden_dim, "v": config.vocab_size}
    inner, outer = math.sqrt(2 / (5 * config.dim)), 2 / (config.n_layers * math.sqrt(config.dim))

    def weight(axes: str, std: float | None) -> Weight:
        return Weight(axes, tuple(sizes[axis] for axis in axes.split()), std)

    layer = Block(
        attention_norm=weight("d", None),
        attention=Attention(wq=weight("k g h d", inner), wk=weight("k h d", inner), wv=weight("k h d", inner),
                            wo=weight("d k g h", min(inner, outer))),
        ffn_norm=weight("d", None),
        feed_forward=FeedForward(w_gate=weight("f d", inner), w_up=weight("f d", inner),
                                 w_down=weight("d f", min(inner, outer))),
    )
    return Params(embedding=weight("v d", inner), blocks=(layer,) * config.n_layers, norm=weight("d", None),
                  output=weight("v d", inner), config=config)


@typed
def init_params(key: Key, config: Config, dtype: torch.dtype = torch.float32,
                device: torch.device | str | None = None) -> Params:
    """Random parameters: normal weights of the abstract tree's deviations, norms of one. The same on every device.

    `device` None is that of the key. On "meta" they are shapes and dtypes without numbers, in no memory. What is made
    of them is, too: that is JAX's `eval_shape`. `forward(params, tokens.to("meta"), init_cache(..., device="meta"))`,
    `loss` and its gradients tell their shapes and dtypes without computing anything.
    """
    abstract, device = abstract_params(config), key.device if device is None else device
    keys = iter(random.split(key, len(tree.leaves(abstract))).to(device))

    def draw(weight: Weight) -> torch.Tensor:
        key = next(keys)
        if key.is_meta:
            return torch.empty(weight.shape, dtype=dtype, device=key.device)
        if weight.std is None:
            return torch.ones(weight.shape, dtype=dtype, device=device)
        return (random.normal(key, weight.shape) * weight.std).to(dtype)

    return tree.map(draw, abstract)
