"""Reading and writing the ``params.json`` of Meta's format."""

import dataclasses
import math
from typing import Any

from torch import Tensor

from llama_fn.config import Config, RopeScaling

SETTINGS = "params.json"
KNOWN = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
         "rope_theta", "max_seq_len", "max_batch_size", "use_scaled_rope"}
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)  # the meaning of `use_scaled_rope` in Meta's llama-models


def read_config(settings: dict[str, Any], state: dict[str, Tensor], where: str) -> Config:
    """The `Config` of a ``params.json``. ``where`` names the file in errors.

    Missing settings have the defaults of Meta's code. A missing ``vocab_size`` is the number of rows of the embedding
    in ``state``. Raises `ValueError` for settings that do not describe a model.
    """
    if missing := [name for name in ("dim", "n_layers", "n_heads") if name not in settings]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    vocab_size = settings.get("vocab_size", -1)
    if vocab_size == -1:  # the value in the released files
        embedding = state.get("tok_embeddings.weight")
        vocab_size = len(embedding) if isinstance(embedding, Tensor) and embedding.ndim else 32000
    kv_heads = settings.get("n_kv_heads")
    try:
        return Config(
            dim=settings["dim"], n_layers=settings["n_layers"], n_heads=settings["n_heads"],
            n_kv_heads=settings["n_heads"] if kv_heads is None else kv_heads, vocab_size=vocab_size,
            hidden_dim=_hidden_dim(settings["dim"], settings.get("multiple_of", 256),
                                   settings.get("ffn_dim_multiplier")),
            norm_eps=settings.get("norm_eps", 1e-5), rope_theta=settings.get("rope_theta", 10000.0),
            max_seq_len=settings.get("max_seq_len", 4096),
            rope_scaling=LLAMA3 if settings.get("use_scaled_rope") else None)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None


def write_config(config: Config) -> dict[str, Any]:
    """The content of a ``params.json``. Raises `ValueError` for RoPE scaling that this format cannot express.

    The format has no setting for the feed-forward's hidden width, so that ``multiple_of`` and ``ffn_dim_multiplier``
    are chosen to give it.
    """
    usual = 8 * config.dim // 3
    settings = dataclasses.asdict(config)
    settings["multiple_of"] = settings.pop("hidden_dim")
    if usual > config.hidden_dim:  # the half makes int() round down to hidden_dim
        settings["ffn_dim_multiplier"] = (config.hidden_dim + 0.5) / usual
    del settings["rope_scaling"]
    if config.rope_scaling == LLAMA3:
        settings["use_scaled_rope"] = True
    elif config.rope_scaling is not None:
        raise ValueError(f"{SETTINGS} cannot express {config.rope_scaling}; write the model in the format hf")
    return settings


def _hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The feed-forward's hidden width by Meta's rule.

    It is 2/3 of 4 * dim, times ``multiplier`` if there is one, rounded up to a multiple of ``multiple_of``.
    """
    for name, value in (("dim", dim), ("multiple_of", multiple_of)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if multiplier is not None and (type(multiplier) not in (int, float) or not 0 < multiplier < math.inf):
        raise ValueError(f"ffn_dim_multiplier must be a number above 0, got {multiplier!r}")
    hidden = 8 * dim // 3
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)
