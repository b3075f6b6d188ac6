"""Hugging Face's layout: `config.json` and `model.safetensors`, or several such files and an index of them. Its older
files, `pytorch_model.bin`, are read where there are no others; they are never written.

Its RoPE turns the pairs (i, i + h/2) of a head where ours, as Meta's, turns (2i, 2i + 1): the rows of `wq` and `wk`
are permuted on the way in and out (as by transformers' `convert_llama_weights_to_hf.py`).
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
from llama_fn.checkpoint.files import entries, header, inside, read_json, read_tensors, write_json, write_safetensors
from llama_fn.checkpoint.hf_config import read_config, write_config
from llama_fn.checkpoint.hf_names import HEAD, hf_name, rope_heads, to_halves, to_interleaved
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
LARGEST_FILE = 5 * 10**9  # bytes, as `save_pretrained` long had it
IGNORED = "rotary_emb.inv_freq"  # a table that old checkpoints have; it follows from the config


def from_hf(state_dict: Mapping[str, Tensor], config: Any) -> Params:
    """The parameters of a `LlamaForCausalLM`: its `state_dict()` and its `config` (or `config.json`, or a `Config`).

    All but `wq` and `wk` share the state's memory. Raises `ValueError` for a config that is no LLaMA's, and for
    weights that are missing, unknown or of another shape or dtype, all of them.
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
    """The state that `LlamaForCausalLM.load_state_dict` takes. All but `wq` and `wk` share the tree's memory."""
    weights = weights_of(params).unquantized("the state of a LlamaForCausalLM")
    return {hf_name(path): _out(weights, path) for path in tree.paths(params)}


def open_hf(folder: Path, dtype: torch.dtype | None = None) -> Weights:
    """The weights of a folder in Hugging Face's layout, mapped into memory; only `wq` and `wk` are copied when read.

    Raises `FileNotFoundError` for a missing file, `ValueError` for damaged ones, for an index that points elsewhere,
    and for settings that make no model.
    """
    config, tied = read_config(read_json(inside(folder, SETTINGS)), str(folder / SETTINGS))
    single, index = _places(folder)
    files = [inside(folder, name) for name in (sorted(set(index.values())) if index else [single])]
    pickled = files[0].suffix == ".bin"
    found = [entry for file in files for entry in (entries(file) if pickled else header(file))]
    copied = dtype not in (None, usual_dtype(found))
    where = {entry.name: folder / entry.file for entry in found}

    @functools.lru_cache(maxsize=len(files))
    def mapped(file: Path, layer: str | None) -> Any:
        return read_tensors(file).__getitem__ if pickled else safe_open(file, "pt").get_tensor

    def read(name: str, layer: str) -> Tensor:
        # What is copied is mapped anew for every layer, so that the pages of those before leave the memory.
        return mapped(where[name], layer if copied else None)(name)

    weights = _weights(str(folder / SETTINGS), config, tied, found, read, dtype)
    strays = [f"{name}: the index says {file}, but it is {'in ' + where[name].name if name in where else 'nowhere'}"
              for name, file in index.items() if name not in where or where[name].name != file]
    return weights._replace(problems=weights.problems + strays)


def write_hf(weights: Weights, folder: Path, shards: int | None, report: ReportBytes) -> None:
    """Write `config.json` and the weights, in `shards` files, or None for as many as hold 5 GB each."""
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
        state = {hf_name(path): _out(weights, path) for path in some}
        write_safetensors(state, folder / name)
        report(sum(x.nbytes for x in state.values()))
        index |= dict.fromkeys(state, name)
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": index})


def _weights(where: str, config: Config, tied: bool, found: list[Stored], tensor: Any,
             dtype: torch.dtype | None) -> Weights:
    """`tensor(name, layer)` gives the numbers of an entry."""
    found = [entry for entry in found if not entry.name.endswith(IGNORED)]
    if config.n_layers > len(found):
        raise ValueError(f"{where}: it says {config.n_layers} layers, but there are {len(found)} weights")
    abstract = tree.paths(abstract_params(config))
    wanted = {hf_name(path): flat_shape(weight) for path, weight in abstract.items()}
    both = any(entry.name == HEAD for entry in found)
    if tied and not both:
        del wanted[HEAD]
    problems = misfits(wanted, found, usual_dtype(found) if dtype is None else None)
    if not problems and both:
        head, embedding = tensor(HEAD, HEAD), tensor(hf_name("embedding"), HEAD)
        if tied and not equal_numbers(head, embedding):
            problems = [f"duplicate: {HEAD} differs from {hf_name('embedding')}, to which tie_word_embeddings ties it"]
        tied = tied or share_memory(head, embedding)

    def read(path: str) -> Tensor:
        x = tensor(hf_name("embedding" if tied and path == "output" else path), layer_of(path)).detach()
        heads = rope_heads(path, config)
        return (x if heads is None else to_interleaved(x, heads)).reshape(abstract[path].shape).to(dtype)

    return Weights(config, read, dtype or usual_dtype(found), found, problems, tied=tied)


def _out(weights: Weights, path: str) -> Tensor:
    x = weights.read(path)
    heads = rope_heads(path, weights.config)
    x = x.reshape(flat_shape(tree.paths(abstract_params(weights.config))[path]))
    return x.contiguous() if heads is None else to_halves(x, heads)


def _places(folder: Path) -> tuple[str, dict[str, str]]:
    """The file with all weights, or an index that tells in which file each weight is. As in transformers, safetensors
    come before `pytorch_model.bin`.
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
