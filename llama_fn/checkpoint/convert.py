"""A model from one folder and format to another, one weight at a time."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch

from llama_fn import tree
from llama_fn.checkpoint.load import Format, check_not_quantized, find, open_tokenizer, open_weights, write
from llama_fn.checkpoint.peft import read_peft
from llama_fn.checkpoint.weights import Weights
from llama_fn.config import Config
from llama_fn.model.init import abstract_params
from llama_fn.transforms.lora import Lora, LowRank, Scale, added
from llama_fn.transforms.quantize import Bits, is_matrix, quantized_leaf


def convert(src: str, dst: Path, to: Format, *, adapter: Path | None = None, shards: int | None = None,
            dtype: torch.dtype | None = None, bits: Bits | None = None, force: bool = False,
            report: Callable[[int, list[int]], object] = lambda done, ends: None) -> Config:
    """Write the model `src` to the folder `dst` in the format `to`. The result is the model's config.

    `adapter` is a folder with a LoRA adapter, which is added to the weights. `dtype` None leaves the weights as they
    are stored. `bits` quantizes the matrices. `force` replaces a model of the same format in `dst`. `report` is called
    after each piece that was written, with the number of bytes so far and with the number at which each tensor ends.

    Only one weight is in memory at a time. An interrupted call leaves nothing behind. Raises `ValueError`, before
    anything is written, for folders that do not fit and for weights that the format cannot hold.
    """
    format, place = find(src)
    if dst.resolve() == (place if place.is_dir() else place.parent).resolve():
        raise ValueError(f"{src} and {dst} are the same folder; choose another DST")
    if dst.exists() and not dst.is_dir():
        raise ValueError(f"{dst} is a file; choose a folder")
    if dst.exists() and any(dst.iterdir()) and not force:
        raise ValueError(f"{dst} exists and is not empty; choose another folder, or replace the model with --force")
    weights = open_weights(format, place, torch.float32 if to == "llama2c" else dtype).checked(place)
    tokenizer = open_tokenizer(place, weights)
    check_not_quantized(weights, bits, place)
    if adapter is not None:
        weights = _merged(weights.unquantized(f"a weight with the adapter {adapter} in it"), adapter)
    if bits is not None:
        weights = _quantized(weights, bits)
    ends = _ends(weights)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done = min(done + count, ends[-1])  # file formats add some bytes of their own
        report(done, ends)

    write(weights, tokenizer, dst, to, shards, wrote)
    report(ends[-1], ends)
    return weights.config


def _ends(weights: Weights) -> list[int]:
    """How many bytes have been written after each tensor."""
    per_number = {"int8": 1, "int4": 9 / 16}.get(weights.bits, weights.dtype.itemsize)  # int4: 4 bytes more for each 64
    return list(itertools.accumulate(
        int(math.prod(leaf.shape) * (per_number if is_matrix(path, leaf) else weights.dtype.itemsize))
        for path, leaf in tree.paths(abstract_params(weights.config)).items()))


def _quantized(weights: Weights, bits: Bits) -> Weights:
    """The weights in integers. Each is quantized when it is read."""
    leaf, abstract = quantized_leaf(bits), tree.paths(abstract_params(weights.config))
    return weights._replace(read=lambda path: leaf(path, abstract[path], weights.read(path)), bits=bits)


def _merged(weights: Weights, folder: Path) -> Weights:
    """The weights plus an adapter. Each is merged when it is read."""
    matrices, alpha = read_peft(folder, weights.config, lambda: weights.read("output"))
    adapter = Lora({path: LowRank(*pair) for path, pair in matrices.items()}, Scale(alpha))
    return weights._replace(read=lambda path: added(adapter, path, weights.read(path)),
                            tied=weights.tied and "output" not in matrices)
