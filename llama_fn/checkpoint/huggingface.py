"""Models in Hugging Face's format: ``config.json`` and ``model.safetensors``, or several such files and an index.

The older ``pytorch_model.bin`` is read if there is no safetensors file. It is never written.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint.files import (
    inside,
    read_json,
    read_tensors,
    safetensors_entries,
    torch_entries,
    write_json,
    write_safetensors,
)
from llama_fn.checkpoint.hf_config import read_config, write_config
from llama_fn.checkpoint.hf_names import LM_HEAD, hf_name, rope_heads, to_halves, to_interleaved
from llama_fn.checkpoint.parts import Part, whole_part
from llama_fn.checkpoint.weights import (
    ReportBytes,
    Stored,
    Weights,
    equal_numbers,
    flat_shape,
    layer_of,
    misfits,
    params_of,
    share_memory,
    stored,
    usual_dtype,
    weights_of,
)
from llama_fn.config import Config
from llama_fn.model.init import abstract_params
from llama_fn.model.transformer import Params

SETTINGS, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FILES = (SETTINGS, WEIGHTS, "model-?????-of-?????.safetensors", INDEX, PICKLE, PICKLE_INDEX,
         "pytorch_model-?????-of-?????.bin", "generation_config.json")
LARGEST_FILE = 5 * 10**9  # bytes; for years the default of `save_pretrained`
IGNORED = "rotary_emb.inv_freq"  # a table in old checkpoints; it is computed from the config


def from_hf(state_dict: Mapping[str, Tensor], config: Any) -> Params:
    """The parameters of a transformers ``LlamaForCausalLM`` that is in memory.

    ``state_dict`` is the model's ``state_dict()``. ``config`` is its ``config``, the content of a ``config.json``, or
    a `Config`. ``from_hf(to_hf(params), params.config)`` equals ``params`` bit for bit. ``wq`` and ``wk`` are copied,
    because their rows are permuted; every other weight shares memory with ``state_dict``.

    Raises `ValueError` for a config that is not LLaMA's. Raises one `ValueError` that lists every weight that is
    missing, unknown, or of a wrong shape or dtype.

    Source: transformers, ``models/llama/modeling_llama.py`` and ``convert_llama_weights_to_hf.py``.

    >>> params = lf.from_hf(lf.to_hf(params), hf_config)
    """
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(state_dict, Mapping) or not isinstance(settings, Mapping | Config):
        raise ValueError("from_hf takes a model's state_dict() and its config, got a "
                         f"{type(state_dict).__name__} and a {type(config).__name__}")
    tied = False
    if not isinstance(settings, Config):
        settings, tied = read_config(settings, "config")
    found = [stored("the state_dict", name, x) for name, x in state_dict.items()]
    weights = _weights("config", settings, tied, found, lambda name, layer: state_dict[name], None)
    weights.checked("from_hf")
    return params_of(weights)


def to_hf(params: Params) -> dict[str, Tensor]:
    """The state dictionary that transformers' ``LlamaForCausalLM.load_state_dict`` takes.

    This is the inverse of `from_hf`, bit for bit. Matrices have the shape (rows, columns), without axes of heads.
    ``wq`` and ``wk`` are copied, because their rows are permuted; every other weight shares memory with ``params``.
    Raises `ValueError` for quantized weights, for adapters that are not merged, and for weights of a wrong shape.

    >>> state = lf.to_hf(params)  # for `LlamaForCausalLM.load_state_dict`
    """
    weights = weights_of(params).unquantized("the state of a LlamaForCausalLM")
    return {hf_name(path): _to_hf_layout(weights, path) for path in tree.paths(abstract_params(params.config))}


def open_hf(folder: Path, dtype: torch.dtype | None = None) -> Weights:
    """The weights of a folder in Hugging Face's format.

    The files are mapped into memory. Only ``wq`` and ``wk`` are copied when they are read, unless ``dtype`` asks for a
    cast. Raises `FileNotFoundError` for a missing file. Raises `ValueError` for a damaged file, for an index that
    names a wrong file, and for a ``config.json`` that does not describe a model which can be loaded.
    """
    config, tied = read_config(read_json(inside(folder, SETTINGS)), str(folder / SETTINGS))
    single, index = _files(folder)
    files = [inside(folder, name) for name in (sorted(set(index.values())) if index else [single])]
    pickled = files[0].suffix == ".bin"
    found = [entry for file in files for entry in (torch_entries(file) if pickled else safetensors_entries(file))]
    where = {entry.name: folder / entry.file for entry in found}

    @functools.lru_cache(maxsize=len(files))
    def opened(file: Path, layer: str | None) -> Any:
        return read_tensors(file).__getitem__ if pickled else safe_open(file, "pt").get_tensor

    def read(name: str, layer: str | None) -> Tensor:
        return opened(where[name], layer)(name)

    weights = _weights(str(folder / SETTINGS), config, tied, found, read, dtype)
    strays = [f"{name}: the index says {file}, but it is {'in ' + where[name].name if name in where else 'nowhere'}"
              for name, file in index.items() if name not in where or where[name].name != file]
    return weights._replace(problems=weights.problems + strays)


def write_hf(weights: Weights, folder: Path, shards: int | None, report: ReportBytes) -> None:
    """Write ``config.json`` and the weights in ``shards`` files; None means files of about 5 GB each."""
    abstract = tree.paths(abstract_params(weights.unquantized("the format hf").config))
    paths = [path for path in abstract if not (weights.tied and path == "output")]
    sizes = [math.prod(abstract[path].shape) * weights.dtype.itemsize for path in paths]
    count = max(1, -(-sum(sizes) // LARGEST_FILE)) if shards is None else shards
    if not 1 <= count <= len(paths):
        raise ValueError(f"{count} files cannot be made of {len(paths)} weights")
    files: list[list[str]] = [[] for _ in range(count)]
    done = at = 0
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        due, last_chance = done * count // sum(sizes) > at, len(paths) - i < count - at
        if files[at] and (due or last_chance):
            at += 1
        files[at].append(path)
        done += size
    index = {}
    write_json(folder / SETTINGS, write_config(weights.config, weights.tied, weights.dtype))
    for i, some in enumerate(files):
        name = WEIGHTS if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        state = {hf_name(path): _to_hf_layout(weights, path) for path in some}
        write_safetensors(state, folder / name)
        report(sum(x.nbytes for x in state.values()))
        index |= dict.fromkeys(state, name)
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": index})


def _weights(where: str, config: Config, tied: bool, found: list[Stored], tensor: Any,
             dtype: torch.dtype | None) -> Weights:
    """`Weights` for the entries ``found``, with all differences from the config as problems.

    ``tensor(name, layer)`` returns the tensor of an entry, newly mapped for each layer unless that is None; ``where``
    names the config in errors.
    """
    found = [entry for entry in found if not entry.name.endswith(IGNORED)]
    if config.n_layers > len(found):
        raise ValueError(f"{where}: it says {config.n_layers} layers, but there are {len(found)} weights")
    abstract, copied = tree.paths(abstract_params(config)), dtype not in (None, usual_dtype(found))
    wanted = {hf_name(path): flat_shape(weight) for path, weight in abstract.items()}
    has_output = any(entry.name == LM_HEAD for entry in found)
    if tied and not has_output:
        del wanted[LM_HEAD]
    problems = misfits(wanted, found, usual_dtype(found) if dtype is None else None)
    if not problems and has_output:
        output, embedding = tensor(LM_HEAD, LM_HEAD), tensor(hf_name("embedding"), LM_HEAD)
        if tied and not equal_numbers(output, embedding):
            problems = [f"duplicate: {LM_HEAD} differs from {hf_name('embedding')}, to which tie_word_embeddings ties "
                        "it"]
        tied = tied or share_memory(output, embedding)

    def read(path: str, part: Part | None = None) -> Tensor:
        name = hf_name("embedding" if tied and path == "output" else path)
        # If weights are copied, map the file anew for each layer, so that the pages of earlier layers are released.
        x = tensor(name, layer_of(path) if copied or part is not None else None).detach()
        shape, heads = abstract[path].shape, rope_heads(path, config)
        if part is None:
            return (x if heads is None else to_interleaved(x, heads)).reshape(shape).to(dtype)
        slices = part.within(whole_part(shape))
        if heads is None:
            return x.reshape(shape)[slices]
        *outer, rows, columns = slices
        x = x.reshape(shape)[(*outer, slice(None), columns)]  # all rows of a head, because they are permuted
        return to_interleaved(x.flatten(0, -2), math.prod(x.shape[:-2])).reshape(x.shape)[..., rows, :]

    return Weights(config, read, dtype or usual_dtype(found), found, problems, tied=tied)


def _to_hf_layout(weights: Weights, path: str) -> Tensor:
    """One weight as Hugging Face stores it."""
    x = weights.read(path)
    heads = rope_heads(path, weights.config)
    x = x.reshape(flat_shape(tree.paths(abstract_params(weights.config))[path]))
    return x.contiguous() if heads is None else to_halves(x, heads)


def _files(folder: Path) -> tuple[str, dict[str, str]]:
    """The name of the single file of weights, and the index: the file of each weight by the weight's name.

    The index is empty if there is a single file. As in transformers, safetensors files win over ``pytorch_model.bin``.
    """
    pickled = not (folder / WEIGHTS).exists() and not (folder / INDEX).exists() and (
        (folder / PICKLE).exists() or (folder / PICKLE_INDEX).exists())
    single, index = (PICKLE, PICKLE_INDEX) if pickled else (WEIGHTS, INDEX)
    if not (folder / index).exists():
        if not (folder / single).exists() and (parts := sorted(folder.glob("*-00001-of-?????.*"))):
            raise FileNotFoundError(f"{folder}: {parts[0].name} is one file of several, and the index of them, "
                                    f"{INDEX if parts[0].suffix == '.safetensors' else PICKLE_INDEX}, is missing")
        return single, {}
    if (folder / single).exists():
        raise ValueError(f"{folder}: both {single} and {index} tell where the weights are; remove the one that is old")
    files = read_json(inside(folder, index)).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f'{folder / index}: expected the names of files under "weight_map"')
    return single, {name: file for name, file in files.items() if not name.endswith(IGNORED)}
