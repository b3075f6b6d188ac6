"""The ``adapter_config.json`` of PEFT's LoRA adapters: which adapters can be read, and which weights they change."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_fn.checkpoint.hf_names import LM_HEAD, hf_name
from llama_fn.config import Config
from llama_fn.model.init import Weight
from llama_fn.transforms.lora import adaptable

WRITTEN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False,
           "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0, "modules_to_save": None,
           "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "use_rslora": False}
# Settings that are either handled or without effect on what an adapter computes. Any other setting must be false, zero,
# empty or null; otherwise the adapter is refused.
KNOWN = {"peft_type", "task_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora", "target_modules",
         "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode", "lora_dropout", "peft_version",
         "base_model_name_or_path", "revision", "auto_mapping", "runtime_config", "megatron_core", "qalora_group_size",
         "eva_config", "ensure_weight_tying"}
# The values of some settings with which an adapter can be read.
UNDERSTOOD = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none",),
              # These initializations leave the model's own weights as they are; "pissa", "olora" and others do not.
              "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None)}
PREFIX = "base_model.model."
BASE = PREFIX + LM_HEAD.replace(".weight", ".base_layer.weight")


def rank_and_alpha(settings: dict, where: Path) -> tuple[int, float]:
    """The rank r and alpha of an adapter.

    Raises `ValueError` for settings that mean anything but W + (alpha / r) B A. With ``use_rslora`` the factor is
    alpha / sqrt(r) (Kalajdzievski 2023), so that alpha * sqrt(r) is returned in place of alpha.
    """
    for name, value in {"peft_type": None, **settings}.items():
        if value not in UNDERSTOOD.get(name, (value,)) or (name not in KNOWN and value):
            raise ValueError(f"{where}: {name} is {shortened(value)}: that is not plain LoRA, which is all that is "
                             "read; let PEFT merge the adapter (`merge_and_unload`), and load the model")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
        raise ValueError(f"{where}: r should be an integer of at least 1, is {shortened(rank)}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 2**31:
        raise ValueError(f"{where}: lora_alpha should be a number, is {shortened(alpha)}")
    return rank, alpha * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)


def targeted(settings: dict, names: set[str], config: Config) -> dict[str, Weight]:
    """The weights that an adapter changes, by their paths.

    ``target_modules`` holds whole names and endings of names. An ending applies only in the layers of
    ``layers_to_transform``, if that setting is there. If ``target_modules`` is a pattern, or other settings restrict
    it, the weights are those in the file, whose entries are ``names``.
    """
    targets, weights, layers = settings.get("target_modules"), adaptable(config), _layers(settings)
    if not isinstance(targets, list) or settings.get("exclude_modules") or settings.get("layers_pattern"):
        return {path: weight for path, weight in weights.items() if not names.isdisjoint(lora_names(path))}

    def is_target(path: str) -> bool:
        whole, *ends = _ends(_module(path))
        return whole in targets or (any(end in targets for end in ends) and (
            layers is None or any(path.startswith(f"blocks.{layer}.") for layer in layers)))

    return {path: weight for path, weight in weights.items() if is_target(path)}


def _layers(settings: dict) -> list[int] | None:
    """The setting ``layers_to_transform`` as a list; None for all layers, which an empty list means too."""
    layers = settings.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise ValueError(f"layers_to_transform should be a layer or a list of layers, is {shortened(layers)}")
    return layers or None


def target_modules(paths: Iterable[str], config: Config) -> list[str]:
    """The setting ``target_modules`` for an adapter of the weights ``paths``.

    A kind of weight that is adapted in every layer is named by its ending, such as "q_proj"; others by whole names.
    """
    ends = {_module(path): _ends(_module(path))[-1] for path in adaptable(config)}
    ours = {_module(path) for path in paths}
    partial = {end for module, end in ends.items() if module not in ours}
    return sorted({module if ends[module] in partial else ends[module] for module in ours})


def lora_names(path: str) -> tuple[str, str]:
    """The names of A and B: "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", and "lora_B" likewise."""
    return f"{PREFIX}{_module(path)}.lora_A.weight", f"{PREFIX}{_module(path)}.lora_B.weight"


def _module(path: str) -> str:
    """The name of the module that holds a weight: "model.layers.0.self_attn.q_proj"."""
    return hf_name(path).removesuffix(".weight")


def _ends(module: str) -> list[str]:
    """All endings of a name: "a.b.c", "b.c" and "c"."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def shortened(value: Any) -> str:
    """A value as text for an error, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
