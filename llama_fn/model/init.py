"""The abstract tree, which has each weight's shape and no numbers, and the random parameters that are drawn by it."""

import math
from dataclasses import dataclass
from typing import Any

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
    """One leaf of the abstract tree: `axes` name the axes of `shape`; `std` is the initial deviation, None for ones."""

    axes: str
    shape: tuple[int, ...]
    std: float | None

    @property
    def inner(self) -> tuple[int, ...]:
        """The sizes of the axes that a matrix sums over: its last axis, and of `wo` all axes of its heads."""
        return self.shape[-1:] if self.axes.endswith("d") else self.shape[1:]

    @property
    def outer(self) -> tuple[int, ...]:
        """The sizes of the axes of a matrix that its result has."""
        return self.shape[:-len(self.inner)]


def abstract_params(config: Config) -> Params:
    """A tree like `Params` whose leaves are the weights' shapes, axes and initial deviations, without numbers.

    Parameters are drawn, checked, loaded and saved by it. The deviations are sqrt(2 / 5d) (Nguyen and Salazar 2019),
    and 2 / (l sqrt(d)) for ``wo`` and ``w_down``, whose results are added up over the layers, so that the sum does not
    grow with depth (Wang and Komatsuzaki 2021, as in GPT-NeoX).

    >>> shapes = lf.tree.map(lambda weight: weight.shape, lf.abstract_params(lf.LLAMA2_7B))
    """
    sizes = {"k": config.n_kv_heads, "g": config.group_size, "h": config.head_dim, "d": config.dim,
             "f": config.hidden_dim, "v": config.vocab_size}
    inner, outer = math.sqrt(2 / (5 * config.dim)), 2 / (config.n_layers * math.sqrt(config.dim))

    def weight(axes: str, std: float | None) -> Any:  # a `Weight` stands where `Params` has a tensor
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
    """Random parameters: weights are normal with the deviations of `abstract_params`, and norms are ones.

    The same ``key`` (of `lf.random.key`) gives the same numbers on every device. ``device`` None is the key's device.
    On ``"meta"`` the parameters have shapes and dtypes but no numbers, and so has all that is computed from them, as
    with JAX's ``eval_shape``. Raises `AxesError` for what is not a key.

    >>> params = lf.init_params(lf.random.key(0), config, dtype=torch.bfloat16)
    """
    abstract, device = abstract_params(config), key.device if device is None else device
    keys = iter(random.split(key, len(tree.leaves(abstract))).to(device))
    return tree.map(lambda weight: draw(next(keys), weight, dtype, device), abstract)


def draw(key: Key, weight: Weight, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """One leaf of random parameters, by a key of its own on the device."""
    if key.is_meta or weight.std is None:
        return (torch.empty if key.is_meta else torch.ones)(weight.shape, dtype=dtype, device=device)
    return (random.normal(key, weight.shape) * weight.std).to(dtype)
