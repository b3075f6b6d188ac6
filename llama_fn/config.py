"""The sizes and constants of a model, with Meta's names for them."""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from llama_fn import tree
from llama_fn.ranges import is_integer, is_number


class RopeScaling(NamedTuple):
    """How RoPE's frequencies are lowered for a context longer than that of the first training.

    ``kind`` is one of two. ``"linear"`` divides all frequencies by ``factor`` (Chen et al. 2023, "Extending Context
    Window via Positional Interpolation"). ``"llama3"`` looks at how many full turns a pair of RoPE makes in
    ``original_max_seq_len`` tokens (Meta's ``apply_scaling`` in llama-models): a frequency with fewer than
    ``low_freq_factor`` turns is divided, one with more than ``high_freq_factor`` is kept, and between them the rule
    passes smoothly from one to the other.

    >>> scaling = lf.RopeScaling("linear", 2.0)
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def checked(self) -> "RopeScaling":
        """The same scaling with its numbers as floats.

        Raises `ValueError` for an unknown kind and for numbers outside their range.
        """
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling of the kind {self.kind!r} is not known, only 'linear' and 'llama3' are")
        numbers = {name: _positive(f"rope_scaling: {name}", getattr(self, name)) for name in self._fields[1:]}
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"rope_scaling: high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor "
                             f"({self.low_freq_factor})")
        original = numbers.pop("original_max_seq_len")
        whole: Any = int(original) if original % 1 == 0 else original  # a file may have a fraction, which is kept
        return RopeScaling(self.kind, **numbers, original_max_seq_len=whole)


@tree.constant
@dataclass(frozen=True)
class Config:
    """The sizes and constants of a LLaMA; a constant in a pytree, which travels in `Params` and has no leaves.

    ``dim`` is the width of the model (axis d), ``hidden_dim`` that of the feed-forward (f), ``n_layers`` the layers
    (l), ``n_heads`` the query heads (k * g), ``n_kv_heads`` the key/value heads (k), ``vocab_size`` the tokens (v).
    ``norm_eps`` is RMSNorm's epsilon and ``rope_theta`` the base of RoPE's frequencies. ``max_seq_len`` is the context,
    in tokens, that the model was trained for, and ``rope_scaling`` the `RopeScaling` of that training, if any.

    Raises `ValueError` for numbers that make no model. An integer may be given for a float, and is kept as a float.

    >>> config = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=128)
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
        """The number of query heads that share one key/value head (axis g)."""
        return self.n_heads // self.n_kv_heads

    @property
    def n_params(self) -> int:
        """The number of parameters: 2 v d + d, and in each layer 2 k g h d + 2 k h d + 3 f d + 2 d."""
        attention = 2 * self.dim * self.n_heads * self.head_dim + 2 * self.dim * self.n_kv_heads * self.head_dim
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        return 2 * self.vocab_size * self.dim + self.dim + self.n_layers * layer


def _positive(name: str, value: Any) -> float:
    """The value as a float. Raises `ValueError` for what is not a finite number above 0."""
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
