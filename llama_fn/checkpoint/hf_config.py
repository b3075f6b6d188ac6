"""Reading and writing the ``config.json`` of Hugging Face's LLaMA models.

A Mistral model is read too if its sliding window is not shorter than its context: then it computes what LLaMA
computes.
"""

from collections.abc import Mapping
from typing import Any

import torch

from llama_fn.checkpoint.weights import spelled
from llama_fn.config import Config, RopeScaling

# The values that transformers assumes for missing settings, by the model's type.
DEFAULTS = {"llama": {"max_position_embeddings": 2048},
            "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}}


def read_config(settings: Mapping[str, Any], where: str) -> tuple[Config, bool]:
    """The `Config` of a ``config.json``, and whether the embedding and the output are one matrix.

    ``where`` names the file in errors. Raises `ValueError` for a missing setting, and for a setting that would change
    the result and is not supported, such as a bias or a sliding window.
    """
    if missing := [name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                     "vocab_size") if name not in settings]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    kind = _kind(settings, where)
    defaults, heads = DEFAULTS[kind], settings["num_attention_heads"]
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}  # the order of transformers
    for name, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False),
                       ("quantization_config", None), ("partial_rotary_factor", 1.0)):
        for place in (settings, rope if isinstance(rope, Mapping) else {}):
            if (value := place.get(name, only)) not in (only, None):
                raise ValueError(f"{where}: {name} is {value!r}, only {only!r} can be loaded (model_type {kind})")
    kv_heads = settings.get("num_key_value_heads", defaults.get("num_key_value_heads"))
    try:
        scaling = _scaling(rope)
        config = Config(
            dim=settings["hidden_size"], n_layers=settings["num_hidden_layers"], n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads, vocab_size=settings["vocab_size"],
            hidden_dim=settings["intermediate_size"], norm_eps=settings.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10000.0)),
            max_seq_len=settings.get("max_position_embeddings", defaults["max_position_embeddings"]),
            rope_scaling=scaling)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    window = settings.get("sliding_window", defaults["sliding_window"]) if kind == "mistral" else None
    if window is not None and not (type(window) is int and window >= config.max_seq_len):
        raise ValueError(f"{where}: sliding_window is {window!r}, less than max_position_embeddings, "
                         f"{config.max_seq_len}: attention within a window cannot be computed; for texts up to the "
                         f"window, where it is no limit, set max_position_embeddings to {window}")
    if settings.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"{where}: head_dim is {settings['head_dim']}, only hidden_size / num_attention_heads = "
                         f"{config.head_dim} can be loaded")
    return config, bool(settings.get("tie_word_embeddings", False))


def _kind(settings: Mapping[str, Any], where: str) -> str:
    """The model's type, "llama" or "mistral". If ``model_type`` is missing, ``architectures`` tells it."""
    kind = settings.get("model_type")
    if kind is None and (named := settings.get("architectures")):
        kinds = {f"{kind.capitalize()}ForCausalLM": kind for kind in DEFAULTS}
        if not isinstance(named, list) or str(named[0]) not in kinds:
            raise ValueError(f"{where}: architectures is {named!r}, only {' or '.join(kinds)} can be loaded")
        return kinds[named[0]]
    if kind not in (None, *DEFAULTS):
        raise ValueError(f"{where}: model_type is {kind!r}, only {' or '.join(map(repr, DEFAULTS))} can be loaded")
    return kind or "llama"


def write_config(config: Config, tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The content of a ``config.json`` for transformers' ``LlamaForCausalLM``."""
    scaling = None
    if config.rope_scaling is not None:
        kind, factor, low, high, original = config.rope_scaling
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "llama3":
            scaling |= {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": config.dim, "intermediate_size": config.hidden_dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "rope_scaling": scaling,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": tied,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": spelled(dtype),
    }


def _scaling(rope: Any) -> RopeScaling | None:
    """The RoPE scaling that the setting ``rope_scaling`` or ``rope_parameters`` describes."""
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope_scaling of the kind {kind!r} is not known, only 'linear' and 'llama3' are")
    wanted = ["factor"] if kind == "linear" else ["factor", "low_freq_factor", "high_freq_factor",
                                                  "original_max_position_embeddings"]
    if missing := [name for name in wanted if name not in rope]:
        raise ValueError(f"rope_scaling of the kind {kind!r}: {', '.join(missing)} missing")
    return RopeScaling(kind, *(rope[name] for name in wanted))
