"""`llama-fn convert`: a model from one format to another."""

import bisect
import itertools
import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from llama_fn import tree
from llama_fn.checkpoint.load import Format, check_not_quantized, find, open_tokenizer, open_weights, write
from llama_fn.checkpoint.peft import read_peft
from llama_fn.checkpoint.weights import Weights
from llama_fn.cli.options import Dtype, dtype_of
from llama_fn.cli.progress import late_bar
from llama_fn.model.init import abstract_params
from llama_fn.transforms.lora import Lora, Scale, added
from llama_fn.transforms.quantize import Bits, is_matrix, quantized_leaf


def convert(src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
            dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")], *, to: Format,
            adapter: Path | None = None, shards: int | None = None, dtype: Dtype = "stored",
            quantize: Bits | None = None, force: bool = False) -> None:
    """Write the model of SRC to the folder DST in another format, number of shards or dtype, with an adapter merged
    into it, or quantized.

    One weight is read at a time. All is written beside DST and moved there at the end: an interrupted run leaves
    nothing.

    Args:
        src: The embedded model "stories", or the folder (of llama2.c also the file) of a model.
        dst: The folder to write to.
        to: "meta" (params.json, consolidated.*.pth), "hf" (config.json, *.safetensors) or "llama2c" (model.bin).
        adapter: A folder with a LoRA adapter of the model (as PEFT writes it), to be added to the weights.
        shards: Into how many files the weights go; by default one, and for "hf" one for each 5 GB.
        dtype: Cast to this dtype, or leave the weights as they are stored; llama2.c's file is always float32.
        quantize: Write every matrix but the embedding in 8 or 4 bits ("int8", "int4"), for llama-fn to read; in the
            format meta only.
        force: Replace a model of the same format that is in DST.
    """
    format, place = find(src)
    if dst.resolve() == (place if place.is_dir() else place.parent).resolve():
        raise ValueError(f"{src} and {dst} are the same folder; choose another DST")
    if dst.exists() and not dst.is_dir():
        raise ValueError(f"{dst} is a file; choose a folder")
    if dst.exists() and any(dst.iterdir()) and not force:
        raise ValueError(f"{dst} exists and is not empty; choose another folder, or replace the model with --force")
    weights = open_weights(format, place, torch.float32 if to == "llama2c" else dtype_of(dtype)).checked(place)
    tokenizer = open_tokenizer(place, weights)
    check_not_quantized(weights, quantize, place)
    if adapter is not None:
        weights = _merged(weights.unquantized(f"a weight with the adapter {adapter} in it"), adapter)
    if quantize is not None:
        weights = _quantized(weights, quantize)
    leaves = tree.paths(abstract_params(weights.config))
    per_number = {"int8": 1, "int4": 9 / 16}.get(weights.bits, weights.dtype.itemsize)  # in groups of 64, 4 bytes more
    ends = list(itertools.accumulate(
        int(math.prod(leaf.shape) * (per_number if is_matrix(path, leaf) else weights.dtype.itemsize))
        for path, leaf in leaves.items()))
    with late_bar(total=ends[-1], unit="B", unit_scale=True, desc=f"0 of {len(ends)} tensors") as get_bar:

        def report(count: int) -> None:
            bar = get_bar()
            bar.update(min(count, bar.total - bar.n))  # file formats add some bytes of their own
            bar.set_description(f"{bisect.bisect(ends, bar.n)} of {len(ends)} tensors", refresh=False)

        write(weights, tokenizer, dst, to, shards, report)
        report(ends[-1])
    print(f"{dst}: {weights.config.n_params:,} parameters, {to}", file=sys.stderr)


def _quantized(weights: Weights, bits: Bits) -> Weights:
    """The weights in integers, each when it is read."""
    leaf, abstract = quantized_leaf(bits), tree.paths(abstract_params(weights.config))
    return weights._replace(read=lambda path: leaf(path, abstract[path], weights.read(path)), bits=bits)


def _merged(weights: Weights, folder: Path) -> Weights:
    """The weights with an adapter in them, each merged when it is read."""
    matrices, alpha = read_peft(folder, weights.config, lambda: weights.read("output"))
    adapter = Lora(matrices, Scale(alpha))
    return weights._replace(read=lambda path: added(adapter, path, weights.read(path)),
                            tied=weights.tied and "output" not in matrices)
