"""PEFT's layout of a LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`, by the names of transformers.

The rows of B that belong to `wq` and `wk` are permuted as those of the weights themselves (see `huggingface.py`).
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from llama_fn.checkpoint.atomic import current, explaining_errors, replacing_folder
from llama_fn.checkpoint.files import header, inside, read_json, read_tensors, write_json, write_safetensors
from llama_fn.checkpoint.huggingface import HEAD, entries, hf_name, rope_heads, to_halves, to_interleaved
from llama_fn.checkpoint.load import SETTINGS as MODELS
from llama_fn.checkpoint.weights import equal_numbers, misfits
from llama_fn.config import Config
from llama_fn.model.init import Weight
from llama_fn.model.transformer import Params
from llama_fn.shapes import typed
from llama_fn.transforms.lora import Lora, LowRank, Scale, adaptable, check_fit

SETTINGS, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
BASE = PREFIX + HEAD.replace(".weight", ".base_layer.weight")

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

Matrices = Mapping[str, tuple[Tensor, Tensor]]  # A and B, with the axes of heads, by the path of their weight


@typed
def save(adapter: Lora, folder: str | os.PathLike[str], params: Params,
         base: str | os.PathLike[str] | None = None) -> None:
    """Write an adapter of `params` as PEFT does, which loads it on the model that `lf.save(..., format="hf")` writes.

    `base` is that model's folder, or its name on the hub: by it, PEFT's `AutoPeftModelForCausalLM.from_pretrained`
    finds the model alone (`base_model_name_or_path`). The files are written beside their places and moved there at the
    end. Raises `ValueError` for an adapter that does not fit, for several ranks, and for the folder of a model.
    """
    check_fit(params, adapter)
    write_peft(adapter.matrices, adapter.scale.alpha, params.config, Path(folder),
               None if base is None else os.fspath(base))


@typed
def load(folder: str | os.PathLike[str], params: Params) -> Lora:
    """Read an adapter for `params`, in its own dtype, from the folder where `save`, or PEFT, wrote it.

    Raises `FileNotFoundError`, and `ValueError` naming everything that does not fit `params` or is no plain LoRA.
    """
    matrices, alpha = read_peft(Path(folder), params.config, lambda: params.output)
    device = params.embedding.device
    return Lora({path: LowRank(a.to(device), b.to(device)) for path, (a, b) in matrices.items()}, Scale(alpha))


def write_peft(matrices: Matrices, alpha: float, config: Config, folder: Path, base: str | None = None) -> None:
    """Write an adapter. `base` is where PEFT finds the model that it belongs to: a folder, or a name on the hub.

    Raises `ValueError` for none, for one of several ranks, for the folder of a model, and for a base without a name.
    """
    if base == "":
        raise ValueError("base is empty: give the folder of the model that the adapter belongs to, or None")
    ranks = sorted({len(a) for a, _ in matrices.values()})
    if len(ranks) != 1:
        raise ValueError(f"an adapter of one rank can be written, this one has {', '.join(map(str, ranks)) or 'none'}")
    with explaining_errors(folder):
        there = [name for name in MODELS.values() if (current(folder) / name).exists()]
    if there:
        raise ValueError(f"{folder}: a model lies there ({there[0]}), and would be read with the adapter in it; "
                         "choose a folder of its own")
    state = {}
    for path, (a, b) in matrices.items():
        rows, heads = b.flatten(0, -2), rope_heads(path, config)
        state |= zip(_names(path), (a.flatten(1), to_halves(rows, heads) if heads else rows), strict=True)
    settings = {**WRITTEN, "base_model_name_or_path": base, "r": ranks[0],
                "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
                "target_modules": _targets(matrices, config)}
    with replacing_folder(folder, (SETTINGS, WEIGHTS, PICKLE)) as beside:
        write_json(beside / SETTINGS, dict(sorted(settings.items())))
        state = {name: x.detach().cpu().contiguous() for name, x in state.items()}
        write_safetensors(state, beside / WEIGHTS)


def read_peft(folder: Path, config: Config, output: Callable[[], Any]) -> tuple[Matrices, float]:
    """The matrices of an adapter for a model with this config, and alpha.

    `output()` is the model's last matrix: PEFT writes it again beside an adapter of it, and it must be the same.
    Raises `FileNotFoundError`, and `ValueError` for damaged files, for what is not plain LoRA, and for weights that
    are missing, unknown or of another shape, all of them.
    """
    folder = current(folder)
    settings, where = read_json(inside(folder, SETTINGS)), folder / SETTINGS
    rank, alpha = _plain(settings, where)
    pickled = not (folder / WEIGHTS).exists() and (folder / PICKLE).exists()  # as older versions of PEFT wrote it
    file = inside(folder, PICKLE if pickled else WEIGHTS)
    found = entries(file) if pickled else header(file)
    try:
        weights = _wanted(settings, {entry.name for entry in found}, config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not weights:
        layers = "" if (only := settings.get("layers_to_transform")) is None else f" in the layers {_short(only)}"
        raise ValueError(f"{where}: target_modules names no weight of the model{layers}: "
                         f"{_short(settings.get('target_modules'))}")
    wanted = {}
    for path, weight in weights.items():
        shapes = (rank, math.prod(weight.inner)), (math.prod(weight.outer), rank)
        wanted |= zip(_names(path), shapes, strict=True)
    if again := [entry for entry in found if entry.name == BASE]:
        wanted[BASE] = (config.vocab_size, config.dim)
    if wrong := misfits(wanted, found, None):
        raise ValueError(f"{folder}: {len(wrong)} weights of the adapter do not fit the model and {SETTINGS}:\n  "
                         + "\n  ".join(wrong))
    matrices, tensor = {}, read_tensors(file).__getitem__ if pickled else safe_open(file, "pt").get_tensor
    if again and not _same(tensor(BASE), output()):
        raise ValueError(f"{file}: {BASE} is not the output of this model: the adapter belongs to another")
    for path, weight in weights.items():
        a, b = (tensor(name).detach() for name in _names(path))
        heads = rope_heads(path, config)
        b = to_interleaved(b, heads) if heads else b
        matrices[path] = a.reshape(rank, *weight.inner), b.reshape(*weight.outer, rank)
    return matrices, alpha


def _plain(settings: dict, where: Path) -> tuple[int, float]:
    """Rank and alpha. Raises `ValueError` for settings that make anything but W + alpha/r B A."""
    for name, value in {"peft_type": None, **settings}.items():
        if value not in UNDERSTOOD.get(name, (value,)) or (name not in KNOWN and value):
            raise ValueError(f"{where}: {name} is {_short(value)}: that is not plain LoRA, which is all that is read; "
                             "let PEFT merge the adapter (`merge_and_unload`), and load the model")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise ValueError(f"{where}: r should be an integer of at least 1, is {_short(rank)}")
    if type(alpha) not in (int, float) or not abs(alpha) < 2**31:
        raise ValueError(f"{where}: lora_alpha should be a number, is {_short(alpha)}")
    # With use_rslora, alpha counts 1/sqrt(r) times (Kalajdzievski 2023).
    return rank, alpha * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)


def _wanted(settings: dict, names: set[str], config: Config) -> dict[str, Weight]:
    """The weights that the settings name: by endings, which count in the layers to transform alone if there are such,
    and by whole names. Where the settings are more than that, those in the file.
    """
    targets, able, layers = settings.get("target_modules"), adaptable(config), _layers(settings)
    if not isinstance(targets, list) or settings.get("exclude_modules") or settings.get("layers_pattern"):
        return {path: weight for path, weight in able.items() if not names.isdisjoint(_names(path))}

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
        raise ValueError(f"layers_to_transform should be a layer or a list of layers, is {_short(layers)}")
    return layers or None


def _targets(paths: Iterable[str], config: Config) -> list[str]:
    """PEFT's `target_modules`: `q_proj` where it is in every layer, else the whole names."""
    ends = {_module(path): _ends(_module(path))[-1] for path in adaptable(config)}
    ours = {_module(path) for path in paths}
    partial = {end for module, end in ends.items() if module not in ours}
    return sorted({module if ends[module] in partial else ends[module] for module in ours})


def _names(path: str) -> tuple[str, str]:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, and `lora_B`."""
    return f"{PREFIX}{_module(path)}.lora_A.weight", f"{PREFIX}{_module(path)}.lora_B.weight"


def _module(path: str) -> str:
    return hf_name(path).removesuffix(".weight")


def _ends(module: str) -> list[str]:
    """`a.b.c`, `b.c`, `c`."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _same(stored: Tensor, output: Any) -> bool:
    """Whether they are equal in the dtype of the one or of the other; an output that is no tensor is not compared."""
    return not isinstance(output, Tensor) or any(
        equal_numbers(stored.to(dtype), output.cpu().to(dtype)) for dtype in (stored.dtype, output.dtype))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
