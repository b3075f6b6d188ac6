"""The sizes and constants of a model, in Meta's spelling."""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from llama_fn import tree
from llama_fn.ranges import is_integer, is_number


class RopeScaling(NamedTuple):
    """How RoPE's frequencies are slowed down for a context longer than the one trained on.

    "linear" (Chen et al. 2023, "Extending Context Window via Positional Interpolation") divides all by `factor`.
    "llama3" (Meta's `apply_scaling` in llama-models) divides those with fewer than `low_freq_factor` turns in
    `original_max_seq_len` tokens, leaves those with more than `high_freq_factor`, and passes from one to the other.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def checked(self) -> "RopeScaling":
        """The same in floats, however the numbers came. Raises `ValueError` for an unknown kind and for numbers that
        scale nothing.
        """
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling of the kind {self.kind!r} is not known, only 'linear' and 'llama3' are")
        numbers = {name: _positive(f"rope_scaling: {name}", getattr(self, name)) for name in self._fields[1:]}
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"rope_scaling: high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor "
                             f"({self.low_freq_factor})")
        original = numbers.pop("original_max_seq_len")
        return RopeScaling(self.kind, **numbers, original_max_seq_len=int(original) if original % 1 == 0 else original)


@tree.constant
@dataclass(frozen=True)
class Config:
    """What a LLaMA is, apart from its weights. A constant in a pytree: it travels in `Params` and has no leaves.

    `dim` is the model's width (axis d), `hidden_dim` the feed-forward's (f), `n_heads` the query heads (k * g),
    `n_kv_heads` the key/value heads (k), `norm_eps` RMSNorm's epsilon, `rope_theta` the base of RoPE's
    frequencies, `max_seq_len` the context that the model was trained for, in tokens, `rope_scaling` how it got there.

    A whole number may be given where a float is meant; it is kept as that float. Raises `ValueError` for numbers that
    make no model.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    hidden_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 4096
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                if not is_integer(value) or value < 1:
                    raise ValueError(f"Config: {field.name} must be an integer of at least 1, got {value!r}")
                object.__setattr__(self, field.name, int(value))  # a frozen dataclass's own way
            if field.type is float:
                object.__setattr__(self, field.name, _positive(f"Config: {field.name}", value))
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"Config: n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads}), "
                             "so that every key/value head serves as many query heads")
        if self.dim % self.n_heads:
            raise ValueError(f"Config: dim ({self.dim}) must be a multiple of n_heads ({self.n_heads})")
        if self.head_dim % 2:
            raise ValueError(f"Config: the width of a head, dim / n_heads = {self.head_dim}, must be even: "
                             "RoPE rotates it in pairs")
        if self.rope_scaling is not None:
            if not isinstance(self.rope_scaling, RopeScaling):
                raise ValueError(f"Config: rope_scaling must be a RopeScaling or None, got {self.rope_scaling!r}")
            object.__setattr__(self, "rope_scaling", self.rope_scaling.checked())

    @property
    def head_dim(self) -> int:
        """The width of one head (axis h)."""
        return self.dim // self.n_heads

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (axis g)."""
        return self.n_heads // self.n_kv_heads

    @property
    def n_params(self) -> int:
        """The number of parameters: v d twice, a norm, and a layer's 2 k g h d + 2 k h d + 3 f d + 2 d."""
        attention = 2 * self.dim * self.n_heads * self.head_dim + 2 * self.dim * self.n_kv_heads * self.head_dim
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        return 2 * self.vocab_size * self.dim + self.dim + self.n_layers * layer


def _positive(name: str, value: Any) -> float:
    """The value as a float. Raises `ValueError` for what is no finite number above 0, in the range of floats."""
    if is_number(value) and 0 < value < math.inf:
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            pass
    raise ValueError(f"{name} must be a number above 0, got {value!r}")


# Touvron et al. 2023, "Llama 2", table 1 and the released params.json files.
LLAMA2_7B = Config(4096, 32, 32, 32, 32000, 11008)
LLAMA2_13B = Config(5120, 40, 40, 40, 32000, 13824)
LLAMA2_70B = Config(8192, 80, 64, 8, 32000, 28672)
