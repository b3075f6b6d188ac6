"""The `adapter_config.json` of PEFT, and its names of weights."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_fn.checkpoint.hf_names import HEAD, hf_name
from llama_fn.config import Config
from llama_fn.model.init import Weight
from llama_fn.transforms.lora import adaptable

WRITTEN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False,
           "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0, "modules_to_save": None,
           "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "use_rslora": False}
# What these say is looked at, or is of no weight for what an adapter computes; of others only "no" is understood.
KNOWN = {"peft_type", "task_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora", "target_modules",
         "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode", "lora_dropout", "peft_version",
         "base_model_name_or_path", "revision", "auto_mapping", "runtime_config", "megatron_core", "qalora_group_size",
         "eva_config", "ensure_weight_tying"}
UNDERSTOOD = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none",),
              # Ways to begin that leave the model's own weights alone; "pissa", "olora" and others do not.
              "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None)}
PREFIX = "base_model.model."
BASE = PREFIX + HEAD.replace(".weight", ".base_layer.weight")


def rank_and_alpha(settings: dict, where: Path) -> tuple[int, float]:
    """Rank and alpha. Raises `ValueError` for settings that make anything but W + alpha/r B A."""
    for name, value in {"peft_type": None, **settings}.items():
        if value not in UNDERSTOOD.get(name, (value,)) or (name not in KNOWN and value):
            raise ValueError(f"{where}: {name} is {shortened(value)}: that is not plain LoRA, which is all that is "
                             "read; let PEFT merge the adapter (`merge_and_unload`), and load the model")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise ValueError(f"{where}: r should be an integer of at least 1, is {shortened(rank)}")
    if type(alpha) not in (int, float) or not abs(alpha) < 2**31:
        raise ValueError(f"{where}: lora_alpha should be a number, is {shortened(alpha)}")
    # With use_rslora, alpha counts 1/sqrt(r) times (Kalajdzievski 2023).
    return rank, alpha * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)


def targeted(settings: dict, names: set[str], config: Config) -> dict[str, Weight]:
    """The weights that the settings name: by endings, which count in the layers to transform alone if there are such,
    and by whole names. Where the settings are more than that, those in the file.
    """
    targets, able, layers = settings.get("target_modules"), adaptable(config), _layers(settings)
    if not isinstance(targets, list) or settings.get("exclude_modules") or settings.get("layers_pattern"):
        return {path: weight for path, weight in able.items() if not names.isdisjoint(lora_names(path))}

    def is_meant(path: str) -> bool:
        whole, *ends = _ends(_module(path))
        return whole in targets or (any(end in targets for end in ends) and (
            layers is None or any(path.startswith(f"blocks.{layer}.") for layer in layers)))

    return {path: weight for path, weight in able.items() if is_meant(path)}


def _layers(settings: dict) -> list[int] | None:
    """The layers to transform; None for all, as PEFT understands an empty list, too."""
    layers = settings.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise ValueError(f"layers_to_transform should be a layer or a list of layers, is {shortened(layers)}")
    return layers or None


def target_modules(paths: Iterable[str], config: Config) -> list[str]:
    """PEFT's `target_modules`: `q_proj` where it is in every layer, else the whole names."""
    ends = {_module(path): _ends(_module(path))[-1] for path in adaptable(config)}
    ours = {_module(path) for path in paths}
    partial = {end for module, end in ends.items() if module not in ours}
    return sorted({module if ends[module] in partial else ends[module] for module in ours})


def lora_names(path: str) -> tuple[str, str]:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, and `lora_B`."""
    return f"{PREFIX}{_module(path)}.lora_A.weight", f"{PREFIX}{_module(path)}.lora_B.weight"


def _module(path: str) -> str:
    return hf_name(path).removesuffix(".weight")


def _ends(module: str) -> list[str]:
    """`a.b.c`, `b.c`, `c`."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
