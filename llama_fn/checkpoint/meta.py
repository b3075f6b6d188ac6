"""Meta's own layout: `params.json` and `consolidated.00.pth`, one file or a shard for each of several devices.

Its matrices are ours without the heads' axes; its RoPE pairs are interleaved, as ours are, so nothing is permuted.
Shards are slices: of the rows of most matrices, of the columns of three, and whole copies of the norms.
Quantized matrices are an addition of ours, in one file: `checkpoint/quantized.py` says how.
"""

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint import quantized
from llama_fn.checkpoint.files import inside, read_json, read_tensors, write_json, write_tensors
from llama_fn.checkpoint.meta_config import KNOWN, SETTINGS, read_config, write_config
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
COLUMNS = ("embedding", "wo", "w_down")  # split along axis 1, as by fairscale's layers
FILES = (SETTINGS, "consolidated.[0-9][0-9].pth")


def open_meta(folder: Path, dtype: torch.dtype | None = None) -> Weights:
    """The weights of a folder in Meta's layout, mapped into memory: of one file, nothing is copied.

    Raises `FileNotFoundError` for a missing file, `ValueError` for damaged ones and for settings that make no model.
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
    wanted = {meta_name(path): _slice(flat_shape(weight), path, len(files)) for path, weight in abstract.items()}
    integers = {path: kind for path, weight in abstract.items() if len(files) == 1 and is_matrix(path, weight)
                and (kind := getattr(states[0].get(meta_name(path)), "dtype", None)) in quantized.BITS}
    kinds = {}
    for path, kind in integers.items():
        for name, (part, shape) in quantized.expected(meta_name(path), abstract[path], kind).items():
            kinds[name], wanted[name] = part, shape
    kept = usual_dtype(entry for entry in entries if entry.name not in kinds)
    problems = _shard_problems(config, found) or [
        line for file, shard in zip(files, found, strict=True)
        for line in misfits(wanted, shard, kept if dtype is None else None, f" in {file.name}", kinds)]
    for name in [] if problems else [meta_name(path) for path in abstract if _axis(path) is None]:
        problems += [f"{name}: differs between {files[0].name} and {file.name}"
                     for file, state in list(zip(files, states, strict=True))[1:]
                     if not equal_numbers(state[name], states[0][name])]
    copied = len(files) > 1 or dtype not in (None, kept)

    @functools.lru_cache(maxsize=1)
    def mapped(layer: str | None) -> list[dict[str, Tensor]]:
        return states if layer is None else [read_tensors(file) for file in files]

    def read(path: str) -> Any:
        if path in integers:
            values, scale = (states[0][meta_name(path) + end].detach() for end in ("", quantized.SCALE))
            return quantized.leaf(abstract[path], values, scale)
        # What is copied is mapped anew for every layer, so that the pages of those before leave the memory.
        pieces = [state[meta_name(path)].detach() for state in mapped(layer_of(path) if copied else None)]
        if len(pieces) == 1 or _axis(path) is None:
            return pieces[0].reshape(abstract[path].shape).to(dtype or kept, copy=copied)  # a view would keep its layer
        whole = torch.empty(flat_shape(abstract[path]), dtype=dtype or kept, device="cpu")
        for place, piece in zip(whole.chunk(len(pieces), _axis(path)), pieces, strict=True):
            place.copy_(piece)
        return whole.reshape(abstract[path].shape)

    unknown = sorted(set(settings) - KNOWN)
    notes = [f"{folder / SETTINGS}: unknown settings, left out of account: {', '.join(unknown)}"] if unknown else []
    name = meta_name("blocks.0.attention.wq")
    notes += [f"{file} holds the numbers of {files[0].name}: is it a copy?"
              for file, state in list(zip(files, states, strict=True))[1:]
              if not problems and equal_numbers(state[name], states[0][name])]
    return Weights(config, read, dtype or kept, entries, problems, notes, bits=quantized.bits(integers.values()))


def write_meta(weights: Weights, folder: Path, shards: int | None, report: ReportBytes) -> None:
    """Write `params.json` and the weights in as many shards as wanted, each held in memory while it is written.

    Raises `ValueError` for what the layout has no word for, and for weights that cannot be split so.
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
            x = leaf.reshape(flat_shape(weight))
            piece = x if _axis(path) is None else x.chunk(count, _axis(path))[i]
            whole = piece.is_contiguous() and piece.untyped_storage().nbytes() == piece.nbytes
            state[meta_name(path)] = piece if whole else piece.clone(memory_format=torch.contiguous_format)
        write_tensors(state, folder / f"consolidated.{i:02d}.pth", report)
    write_json(folder / SETTINGS, settings)


def meta_name(path: str) -> str:
    """`blocks.0.feed_forward.w_gate` -> `layers.0.feed_forward.w1.weight`."""
    if path == "embedding":
        return "tok_embeddings.weight"
    *parents, last = path.split(".")
    parents = ["layers" if part == "blocks" else part for part in parents]
    return ".".join([*parents, FEED_FORWARD.get(last, last), "weight"])


def _shards(folder: Path) -> list[Path]:
    """`consolidated.00.pth`, `consolidated.01.pth`, ..., all there."""
    count = sum(re.fullmatch(r"consolidated\.[0-9]{2,}\.pth", file.name) is not None for file in folder.iterdir())
    return [inside(folder, f"consolidated.{i:02d}.pth") for i in range(max(1, count))]


def _axis(path: str) -> int | None:
    """The axis along which a weight is split into shards; None for a norm, which every shard has whole."""
    last = path.split(".")[-1]
    return None if last.endswith("norm") else int(last in COLUMNS)


def _slice(shape: tuple[int, ...], path: str, count: int) -> tuple[int, ...]:
    return tuple(size // count if axis == _axis(path) else size for axis, size in enumerate(shape))


def _indivisible(config: Config, count: int) -> str:
    sizes = {"dim": config.dim, "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads,
             "hidden_dim": config.hidden_dim, "vocab_size": config.vocab_size}
    if count < 1:
        return f"their number must be at least 1, got {count}"
    return ", ".join(f"{name} is {size}" for name, size in sizes.items() if size % count)


def _shard_problems(config: Config, found: list[list]) -> list[str]:
    """What is wrong with the number of shards."""
    widths = {entry.shape[1] for entries in found for entry in entries
              if entry.name == "tok_embeddings.weight" and len(entry.shape) == 2}
    width = widths.pop() if len(widths) == 1 else 0
    if width and config.dim % width == 0 and (count := config.dim // width) != len(found):
        return [f"there are {len(found)} of {count} shards, by the width of tok_embeddings.weight ({width} of "
                f"{config.dim}); consolidated.00.pth to consolidated.{count - 1:02d}.pth belong together"]
    if wrong := _indivisible(config, len(found)):
        return [f"{len(found)} shards cannot make a model where {wrong}"]
    return []
