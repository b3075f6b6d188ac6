"""Models in Meta's format: ``params.json`` and ``consolidated.00.pth``, ``consolidated.01.pth``, ...

Meta's matrices are ours without the axes of heads. Their RoPE pairs are interleaved like ours, so that no rows are
permuted. A model for several devices has one file, a shard, for each device. A shard holds a slice of each matrix: a
slice of the columns for the embedding, ``wo`` and ``w_down``, and a slice of the rows for the others. Norms are whole
in every shard. Quantized matrices are our extension of the format; `checkpoint/quantized.py` describes them.

Source: https://github.com/meta-llama/llama, ``llama/model.py`` and ``llama/generation.py``.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint import quantized
from llama_fn.checkpoint.files import inside, read_json, read_tensors, write_json, write_tensors
from llama_fn.checkpoint.meta_config import KNOWN, SETTINGS, read_config, write_config
from llama_fn.checkpoint.parts import Part, common, whole_part
from llama_fn.checkpoint.weights import (
    ReportBytes,
    Weights,
    equal_numbers,
    flat_shape,
    layer_of,
    misfits,
    stored,
    usual_dtype,
)
from llama_fn.config import Config
from llama_fn.model.init import abstract_params
from llama_fn.transforms.quantize import is_matrix

FEED_FORWARD = {"w_gate": "w1", "w_down": "w2", "w_up": "w3"}
SPLIT_BY_COLUMNS = ("embedding", "wo", "w_down")  # along axis 1, as in fairscale's layers
FILES = (SETTINGS, "consolidated.[0-9][0-9].pth")


def open_meta(folder: Path, dtype: torch.dtype | None = None) -> Weights:
    """The weights of a folder in Meta's format.

    The files are mapped into memory. The weights of a single file are not copied when they are read, unless ``dtype``
    asks for a cast. Raises `FileNotFoundError` for a missing file, and `ValueError` for damaged files and for settings
    that do not describe a model.
    """
    settings = read_json(inside(folder, SETTINGS))
    files = _shards(folder)
    states = [read_tensors(file) for file in files]
    config = read_config(settings, states[0], str(folder / SETTINGS))
    if config.n_layers > len(states[0]):
        raise ValueError(f"{folder / SETTINGS}: n_layers is {config.n_layers}, but {files[0].name} has "
                         f"{len(states[0])} weights")
    abstract = tree.paths(abstract_params(config))
    found = [[stored(file.name, name, x) for name, x in state.items() if name != "rope.freqs"]
             for file, state in zip(files, states, strict=True)]
    entries = [entry for shard in found for entry in shard]
    wanted = {meta_name(path): _shape_in_shard(flat_shape(weight), path, len(files))
              for path, weight in abstract.items()}
    integers = {path: kind for path, weight in abstract.items() if len(files) == 1 and is_matrix(path, weight)
                and (kind := getattr(states[0].get(meta_name(path)), "dtype", None)) in quantized.BITS}
    kinds = {}
    for path, kind in integers.items():
        for name, (part, shape) in quantized.expected(meta_name(path), abstract[path], kind).items():
            kinds[name], wanted[name] = part, shape
    usual = usual_dtype(entry for entry in entries if entry.name not in kinds)
    problems = _shard_problems(config, found) or [
        line for file, shard in zip(files, found, strict=True)
        for line in misfits(wanted, shard, usual if dtype is None else None, f" in {file.name}", kinds)]
    for name in [] if problems else [meta_name(path) for path in abstract if _axis(path) is None]:
        problems += [f"{name}: differs between {files[0].name} and {file.name}"
                     for file, state in list(zip(files, states, strict=True))[1:]
                     if not equal_numbers(state[name], states[0][name])]
    copied = len(files) > 1 or dtype not in (None, usual)

    @functools.lru_cache(maxsize=1)
    def opened(layer: str | None) -> Callable[[int], dict[str, Tensor]]:
        return states.__getitem__ if layer is None else functools.cache(lambda i: read_tensors(files[i]))

    def read(path: str, part: Part | None = None) -> Any:
        name, axis, shape = meta_name(path), _axis(path), abstract[path].shape
        if path in integers:
            return quantized.leaf(abstract[path], *(states[0][name + end].detach() for end in ("", quantized.SCALE)))
        wanted = whole_part(shape) if part is None else part
        # If weights are copied, map the files anew for each layer, so that the pages of earlier layers are released.
        state = opened(layer_of(path) if copied or part is not None else None)
        if len(files) == 1 or axis is None:  # copy, because a view would keep the layer's pages in memory
            x = state(0)[name].detach().reshape(shape)
            return x.to(dtype or usual, copy=copied) if part is None else x[part.within(whole_part(shape))]
        whole: Tensor | None = None
        for i in range(len(files)):  # heads lie whole in a shard, so that it has a part of the axis k
            length = shape[axis] // len(files)
            stored = Part(tuple(i * length * (j == axis) for j in range(len(shape))),
                          (*shape[:axis], length, *shape[axis + 1:]))
            shared = common(wanted, stored)
            if not shared.size:
                continue
            piece = state(i)[name].detach().reshape(stored.shape)[shared.within(stored)]
            if shared == wanted:
                return piece
            whole = torch.empty(wanted.shape, dtype=dtype or usual, device="cpu") if whole is None else whole
            whole[shared.within(wanted)].copy_(piece)
        return whole

    unknown = sorted(set(settings) - KNOWN)
    notes = [f"{folder / SETTINGS}: unknown settings, left out of account: {', '.join(unknown)}"] if unknown else []
    name = meta_name("blocks.0.attention.wq")
    notes += [f"{file} holds the numbers of {files[0].name}: is it a copy?"
              for file, state in list(zip(files, states, strict=True))[1:]
              if not problems and equal_numbers(state[name], states[0][name])]
    return Weights(config, read, dtype or usual, entries, problems, notes, bits=quantized.bits(integers.values()))


def write_meta(weights: Weights, folder: Path, shards: int | None, report: ReportBytes) -> None:
    """Write ``params.json`` and the weights in ``shards`` files; None means one file.

    One file at a time is held in memory. Raises `ValueError` for a config that ``params.json`` cannot express, and for
    sizes that cannot be divided by ``shards``.
    """
    settings, count = write_config(weights.config), 1 if shards is None else shards
    if count > 1:
        weights.unquantized(f"{count} shards")
    if wrong := _indivisible(weights.config, count):
        raise ValueError(f"{count} shards cannot be made: {wrong}")
    abstract = tree.paths(abstract_params(weights.config))
    for i in range(count):
        state = {}
        for path, weight in abstract.items():
            leaf = weights.read(path)
            if not isinstance(leaf, Tensor):
                state |= quantized.entries(meta_name(path), leaf)
                continue
            x, axis = leaf.reshape(flat_shape(weight)), _axis(path)
            piece = x if axis is None else x.chunk(count, axis)[i]
            whole = piece.is_contiguous() and piece.untyped_storage().nbytes() == piece.nbytes
            state[meta_name(path)] = piece if whole else piece.clone(memory_format=torch.contiguous_format)
        write_tensors(state, folder / f"consolidated.{i:02d}.pth", report)
    write_json(folder / SETTINGS, settings)


def meta_name(path: str) -> str:
    """Meta's name of a weight.

    "blocks.0.feed_forward.w_gate" becomes "layers.0.feed_forward.w1.weight".
    """
    if path == "embedding":
        return "tok_embeddings.weight"
    *parents, last = path.split(".")
    parents = ["layers" if part == "blocks" else part for part in parents]
    return ".".join([*parents, FEED_FORWARD.get(last, last), "weight"])


def _shards(folder: Path) -> list[Path]:
    """The files ``consolidated.00.pth``, ``consolidated.01.pth``, ... Raises `FileNotFoundError` if one is missing."""
    count = sum(re.fullmatch(r"consolidated\.[0-9]{2,}\.pth", file.name) is not None for file in folder.iterdir())
    return [inside(folder, f"consolidated.{i:02d}.pth") for i in range(max(1, count))]


def _axis(path: str) -> int | None:
    """The axis along which a weight is split into shards; None for a norm, which is whole in every shard."""
    last = path.split(".")[-1]
    return None if last.endswith("norm") else int(last in SPLIT_BY_COLUMNS)


def _shape_in_shard(shape: tuple[int, ...], path: str, count: int) -> tuple[int, ...]:
    """The shape that a weight has in one of ``count`` shards."""
    return tuple(size // count if axis == _axis(path) else size for axis, size in enumerate(shape))


def _indivisible(config: Config, count: int) -> str:
    """Why a model cannot be split into ``count`` shards; an empty text if it can."""
    sizes = {"dim": config.dim, "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads,
             "hidden_dim": config.hidden_dim, "vocab_size": config.vocab_size}
    if count < 1:
        return f"their number must be at least 1, got {count}"
    return ", ".join(f"{name} is {size}" for name, size in sizes.items() if size % count)


def _shard_problems(config: Config, found: list[list]) -> list[str]:
    """What is wrong with the number of shards, judging by the width of the embedding in them."""
    widths = {entry.shape[1] for entries in found for entry in entries
              if entry.name == "tok_embeddings.weight" and len(entry.shape) == 2}
    width = widths.pop() if len(widths) == 1 else 0
    if width and config.dim % width == 0 and (count := config.dim // width) != len(found):
        return [f"there are {len(found)} of {count} shards, by the width of tok_embeddings.weight ({width} of "
                f"{config.dim}); consolidated.00.pth to consolidated.{count - 1:02d}.pth belong together"]
    if wrong := _indivisible(config, len(found)):
        return [f"{len(found)} shards cannot make a model where {wrong}"]
    return []
