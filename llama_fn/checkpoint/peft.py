"""LoRA adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

The weights have transformers' names. The rows of B for ``wq`` and ``wk`` are permuted as the rows of the weights
themselves are (see ``hf_names.py``).
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from llama_fn.checkpoint.atomic import current, replacing_folder
from llama_fn.checkpoint.files import (
    inside,
    read_json,
    read_tensors,
    safetensors_entries,
    torch_entries,
    write_json,
    write_safetensors,
)
from llama_fn.checkpoint.hf_names import rope_heads, to_halves, to_interleaved
from llama_fn.checkpoint.load import MARKERS
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
from llama_fn.checkpoint.write_errors import explaining_errors
from llama_fn.config import Config
from llama_fn.model.transformer import Params
from llama_fn.ops.weight import on_one_device
from llama_fn.shapes import typed
from llama_fn.transforms.lora import Lora, LowRank, Scale, check_fit

SETTINGS, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


Matrices = Mapping[str, tuple[Tensor, Tensor]]  # A and B with axes of heads, by the path of the weight


@typed
def save(adapter: Lora, folder: str | os.PathLike[str], params: Params,
         base: str | os.PathLike[str] | None = None) -> None:
    """Write a LoRA adapter of ``params`` to a folder in PEFT's format.

    `lf.lora.load` reads it back bit for bit. PEFT loads it on top of the model that ``lf.save(model, path,
    format="hf")`` writes. ``base`` is the folder of that model, or its name on the hub. PEFT's
    ``AutoPeftModelForCausalLM.from_pretrained`` needs it to find the model. The write is atomic, as that of `lf.save`.

    Raises `ValueError` for an adapter that does not fit ``params``, for one whose matrices have different ranks, and
    for a folder that holds a model. Raises `OSError` that names the file and a remedy if a write fails.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; PEFT's ``LoraConfig``.

    >>> lf.lora.save(adapter, "my-lora", params)
    """
    on_one_device("lora.save", adapter)
    check_fit(params, adapter)
    write_peft(adapter.matrices, adapter.scale.alpha, params.config, Path(folder),
               None if base is None else os.fspath(base))


@typed
def load(folder: str | os.PathLike[str], params: Params) -> Lora:
    """Read a LoRA adapter for ``params`` from a folder that `lf.lora.save` or PEFT wrote.

    The adapter keeps its own dtype and is put on the device of ``params``. Raises `FileNotFoundError` for a missing
    file. Raises `ValueError` for an adapter that is not plain LoRA, W + (alpha / r) B A, and one `ValueError` that
    lists all weights that do not fit ``params``.

    >>> adapter = lf.lora.load("my-lora", params)
    """
    matrices, alpha = read_peft(Path(folder), params.config, lambda: params.output)
    device = params.embedding.device
    return Lora({path: LowRank(a.to(device), b.to(device)) for path, (a, b) in matrices.items()}, Scale(alpha))


def write_peft(matrices: Matrices, alpha: float, config: Config, folder: Path, base: str | None = None) -> None:
    """Write the matrices of an adapter. ``base`` is the folder of its model, or the model's name on the hub.

    Raises `ValueError` for an adapter without matrices or with several ranks, for a folder that holds a model, and for
    an empty ``base``.
    """
    if base == "":
        raise ValueError("base is empty: give the folder of the model that the adapter belongs to, or None")
    ranks = sorted({len(a) for a, _ in matrices.values()})
    if len(ranks) != 1:
        raise ValueError(f"an adapter of one rank can be written, this one has {', '.join(map(str, ranks)) or 'none'}")
    with explaining_errors(folder):
        models = [name for name in MARKERS.values() if (current(folder) / name).exists()]
    if models:
        raise ValueError(f"{folder}: a model lies there ({models[0]}), and would be read with the adapter in it; "
                         "choose a folder of its own")
    state = {}
    for path, (a, b) in matrices.items():
        rows, heads = b.flatten(0, -2), rope_heads(path, config)
        state |= zip(lora_names(path), (a.flatten(1), to_halves(rows, heads) if heads else rows), strict=True)
    settings = {**WRITTEN, "base_model_name_or_path": base, "r": ranks[0],
                "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
                "target_modules": target_modules(matrices, config)}
    with replacing_folder(folder, (SETTINGS, WEIGHTS, PICKLE)) as temporary:
        write_json(temporary / SETTINGS, dict(sorted(settings.items())))
        state = {name: x.detach().cpu().contiguous() for name, x in state.items()}
        write_safetensors(state, temporary / WEIGHTS)


def read_peft(folder: Path, config: Config, output: Callable[[], Any]) -> tuple[Matrices, float]:
    """The matrices of an adapter for a model with this config, and alpha.

    ``output()`` returns the model's output matrix. If an adapter changes the output, PEFT writes the model's own
    output next to it, and the two must be equal. Raises `FileNotFoundError` for a missing file. Raises `ValueError`
    for damaged files, for an adapter that is not plain LoRA, and one `ValueError` that lists all weights that are
    missing, unknown or of a wrong shape.
    """
    folder = current(folder)
    settings, where = read_json(inside(folder, SETTINGS)), folder / SETTINGS
    rank, alpha = rank_and_alpha(settings, where)
    pickled = not (folder / WEIGHTS).exists() and (folder / PICKLE).exists()  # older versions of PEFT wrote it
    file = inside(folder, PICKLE if pickled else WEIGHTS)
    found = torch_entries(file) if pickled else safetensors_entries(file)
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
    if has_output := any(entry.name == BASE for entry in found):
        wanted[BASE] = (config.vocab_size, config.dim)
    if wrong := misfits(wanted, found, None):
        raise ValueError(f"{folder}: {len(wrong)} weights of the adapter do not fit the model and {SETTINGS}:\n  "
                         + "\n  ".join(wrong))
    matrices, tensor = {}, read_tensors(file).__getitem__ if pickled else safe_open(file, "pt").get_tensor
    if has_output and not _is_output(tensor(BASE), output()):
        raise ValueError(f"{file}: {BASE} is not the output of this model: the adapter belongs to another")
    for path, weight in weights.items():
        a, b = (tensor(name).detach() for name in lora_names(path))
        heads = rope_heads(path, config)
        b = to_interleaved(b, heads) if heads else b
        matrices[path] = a.reshape(rank, *weight.inner), b.reshape(*weight.outer, rank)
    return matrices, alpha


def _is_output(stored: Tensor, output: Any) -> bool:
    """Whether a stored output equals the model's, in the dtype of either one.

    A quantized output is not compared, and counts as equal.
    """
    return not isinstance(output, Tensor) or any(
        equal_numbers(stored.to(dtype), output.cpu().to(dtype)) for dtype in (stored.dtype, output.dtype))


