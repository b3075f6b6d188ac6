"""PEFT's layout of a LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`, by the names of transformers.

The rows of B that belong to `wq` and `wk` are permuted as those of the weights themselves (see `huggingface.py`).
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from llama_fn.checkpoint.atomic import current, explaining_errors, replacing_folder
from llama_fn.checkpoint.files import entries, header, inside, read_json, read_tensors, write_json, write_safetensors
from llama_fn.checkpoint.hf_names import rope_heads, to_halves, to_interleaved
from llama_fn.checkpoint.load import SETTINGS as MODELS
from llama_fn.checkpoint.peft_config import (
    BASE,
    WRITTEN,
    lora_names,
    rank_and_alpha,
    shortened,
    target_modules,
    targeted,
)
from llama_fn.checkpoint.weights import equal_numbers, misfits
from llama_fn.config import Config
from llama_fn.model.transformer import Params
from llama_fn.shapes import typed
from llama_fn.transforms.lora import Lora, LowRank, Scale, check_fit

SETTINGS, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


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
        state |= zip(lora_names(path), (a.flatten(1), to_halves(rows, heads) if heads else rows), strict=True)
    settings = {**WRITTEN, "base_model_name_or_path": base, "r": ranks[0],
                "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
                "target_modules": target_modules(matrices, config)}
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
    rank, alpha = rank_and_alpha(settings, where)
    pickled = not (folder / WEIGHTS).exists() and (folder / PICKLE).exists()  # as older versions of PEFT wrote it
    file = inside(folder, PICKLE if pickled else WEIGHTS)
    found = entries(file) if pickled else header(file)
    try:
        weights = targeted(settings, {entry.name for entry in found}, config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not weights:
        layers = "" if (only := settings.get("layers_to_transform")) is None else f" in the layers {shortened(only)}"
        raise ValueError(f"{where}: target_modules names no weight of the model{layers}: "
                         f"{shortened(settings.get('target_modules'))}")
    wanted = {}
    for path, weight in weights.items():
        shapes = (rank, math.prod(weight.inner)), (math.prod(weight.outer), rank)
        wanted |= zip(lora_names(path), shapes, strict=True)
    if again := [entry for entry in found if entry.name == BASE]:
        wanted[BASE] = (config.vocab_size, config.dim)
    if wrong := misfits(wanted, found, None):
        raise ValueError(f"{folder}: {len(wrong)} weights of the adapter do not fit the model and {SETTINGS}:\n  "
                         + "\n  ".join(wrong))
    matrices, tensor = {}, read_tensors(file).__getitem__ if pickled else safe_open(file, "pt").get_tensor
    if again and not _same(tensor(BASE), output()):
        raise ValueError(f"{file}: {BASE} is not the output of this model: the adapter belongs to another")
    for path, weight in weights.items():
        a, b = (tensor(name).detach() for name in lora_names(path))
        heads = rope_heads(path, config)
        b = to_interleaved(b, heads) if heads else b
        matrices[path] = a.reshape(rank, *weight.inner), b.reshape(*weight.outer, rank)
    return matrices, alpha


def _same(stored: Tensor, output: Any) -> bool:
    """Whether they are equal in the dtype of the one or of the other; an output that is no tensor is not compared."""
    return not isinstance(output, Tensor) or any(
        equal_numbers(stored.to(dtype), output.cpu().to(dtype)) for dtype in (stored.dtype, output.dtype))


