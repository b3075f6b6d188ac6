"""A model in and out of a folder: its parameters and its tokenizer, in any of the formats."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint import chat_files, huggingface, llama2c, meta
from llama_fn.checkpoint.atomic import current, explaining_errors, replacing_folder
from llama_fn.checkpoint.files import is_torch_file
from llama_fn.checkpoint.tokenizer_files import FILES as TOKENIZER_FILES
from llama_fn.checkpoint.tokenizer_files import read_tokenizer, write_tokenizer
from llama_fn.checkpoint.weights import ReportBytes, Weights, check_dtype, params_of, weights_of
from llama_fn.model.transformer import Params
from llama_fn.ranges import integer
from llama_fn.tokenizer import Tokenizer
from llama_fn.transforms.quantize import Bits, quantized_leaf

STORIES = Path(__file__).parent.parent / "stories"
EMBEDDED = {"stories": STORIES / "model", "stories-draft": STORIES / "draft"}
TOKENIZER = "tokenizer.model"
Format = Literal["meta", "hf", "llama2c"]
MaybeNone: TypeAlias = Any  # "or None", for readers; a type checker lets every use of it pass, as typeshed's does
SETTINGS: dict[Format, str] = {"meta": meta.SETTINGS, "hf": huggingface.SETTINGS, "llama2c": llama2c.WEIGHTS}


class Model(NamedTuple):
    """A language model: text to tokens to logits, and back. The tokenizer is None if none lies with the weights."""

    params: Params
    tokenizer: Tokenizer | MaybeNone


def check_tokenizer(model: Model) -> None:
    """Raise `ValueError` for a model without a tokenizer, where text is asked for."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, for none lies with its weights; give it one: "
                         "model._replace(tokenizer=lf.load_tokenizer(path))")


def load(path_or_name: str | os.PathLike[str], *, dtype: torch.dtype | None = None,
         device: torch.device | str | None = None, quantize: Bits | None = None) -> Model:
    """The embedded model "stories" or its draft "stories-draft" (by this string), or the model of a folder in Meta's or
    Hugging Face's layout, or of llama2.c, told apart by their files.

    `dtype` None keeps the weights as they are stored; then those of one file of Meta's are not copied but mapped: they
    are read from the disk when they are used. Otherwise they are cast one by one. `quantize="int8"` or `"int4"` is
    what `lf.quantize` makes of the model, one weight at a time: it is never in memory as a whole. Weights that were
    saved quantized come back so, and `dtype` is then that of the embedding and the norms. The tokenizer lies with the
    weights or, as in Meta's download, one folder above; if there is none, it is None. Rows of the weights beyond its
    vocabulary are added tokens, or padding, which decodes to nothing. Raises `FileNotFoundError` and `ValueError`,
    naming the file and everything that is wrong with it.
    """
    form = [] if quantize is None else [quantized_leaf(quantize)]
    format, place = find(path_or_name)
    weights = open_weights(format, place, dtype).checked(place)
    check_not_quantized(weights, quantize, place)
    tokenizer = open_tokenizer(place, weights)
    return Model(params_of(weights, device, *form), tokenizer)


def save(model: Model, path: str | os.PathLike[str], *, format: Format = "meta", shards: int | None = None,
         dtype: torch.dtype | None = None) -> None:
    """Write a model to a folder, so that `load` reads it back bit for bit (`dtype` None), or cast.

    The formats are "meta", in any number of `shards`; "hf", which transformers reads; and "llama2c", in float32, which
    llama2.c's run.c reads. Quantized weights go into one file of "meta", and only `load` reads them. A tokenizer that
    is None is not written. "hf" warns of a tokenizer that transformers cannot be told of; "llama2c" refuses one that
    run.c would take for another.

    When `save` returns, the model is on the disk. If it fails, is killed, or the power fails, `load` reads the model
    of the same format that was there before, or the new one; none of the old files stays after. Raises `ValueError`
    for a folder with a model of another format, and for what the format cannot hold; `OSError` that names the file and
    the remedy if the disk is full or nothing may be written there.
    """
    shards = None if shards is None else integer("save: shards", shards)
    write(weights_of(model.params, dtype), model.tokenizer, path, format, shards)


def find(path_or_name: str | os.PathLike[str]) -> tuple[Format, Path]:
    """The format of a model, and where it lies: a folder, or llama2.c's file."""
    path = Path(path_or_name)
    path = newer if (newer := current(path.parent) / path.name).is_file() else current(path)
    there = [format for format, name in SETTINGS.items() if (path / name).is_file()]
    if isinstance(path_or_name, str) and path_or_name in EMBEDDED:
        if there:
            raise ValueError(f"{path_or_name} is an embedded model and a folder here; "
                             f"for the folder say ./{path_or_name}")
        return "meta", EMBEDDED[path_or_name]
    if path.is_file() and path.suffix == ".bin":
        if is_torch_file(path):
            raise ValueError(f"{path_or_name}: a file of PyTorch's, and no checkpoint of llama2.c's; give the folder "
                             f"that holds it and {huggingface.SETTINGS}: {Path(path_or_name).parent}")
        return "llama2c", path
    if not there:
        raise FileNotFoundError(f"{path_or_name}: no model there: expected the name of an embedded model "
                                f"({', '.join(EMBEDDED)}), or a folder with {meta.SETTINGS} (Meta's), "
                                f"{huggingface.SETTINGS} (Hugging Face's) or {llama2c.WEIGHTS} (llama2.c's)")
    if len(there) > 1:
        raise ValueError(f"{path}: models in the formats {' and '.join(there)} lie there together, by "
                         f"{' and '.join(SETTINGS[format] for format in there)}; put each in a folder of its own")
    return there[0], path / llama2c.WEIGHTS if there[0] == "llama2c" else path


def open_weights(format: Format, place: Path, dtype: torch.dtype | None = None) -> Weights:
    """The weights of the place that `find` found, before a number is read."""
    check_dtype(dtype)
    opener = {"meta": meta.open_meta, "hf": huggingface.open_hf, "llama2c": llama2c.open_llama2c}[format]
    return opener(place, dtype)


def check_not_quantized(weights: Weights, bits: Bits | None, place: Path) -> None:
    """Raise `ValueError` where weights that are integers are to be quantized."""
    if bits is not None and weights.bits:
        raise ValueError(f"{place}: its weights are quantized already, to {weights.bits}; leave quantize out, or "
                         "quantize the model that they were made of")


def open_tokenizer(place: Path, weights: Weights) -> Tokenizer | None:
    """The tokenizer of a model, with what its folder says of dialogs; None if there is none.

    Raises `ValueError` for more tokens than the weights have.
    """
    folder = place if place.is_dir() else place.parent
    tokenizer = read_tokenizer(folder, weights.config.vocab_size)
    return None if tokenizer is None else chat_files.read_chat(tokenizer, folder)


def write(weights: Weights, tokenizer: Tokenizer | None, path: str | os.PathLike, format: Format,
          shards: int | None = None, report: ReportBytes = lambda _: None) -> None:
    """Write weights, a leaf at a time, and their tokenizer, if there is one. `report` is told of bytes as they are
    written.
    """
    writers = {"meta": (meta.write_meta, meta.FILES), "hf": (huggingface.write_hf, huggingface.FILES),
               "llama2c": (llama2c.write_llama2c, llama2c.FILES)}
    if format not in writers:
        raise ValueError(f"unknown format {format!r}, only {', '.join(map(repr, writers))} are known")
    with explaining_errors(Path(path)):
        others = [name for other, name in SETTINGS.items() if other != format and (current(path) / name).exists()]
    if others:
        raise ValueError(f"{path}: a model in another format lies there ({others[0]}); choose a folder of its own")
    writer, files = writers[format]
    weights = weights._replace(read=functools.partial(_on_cpu, weights.read))
    with replacing_folder(path, (*files, *TOKENIZER_FILES, *chat_files.FILES)) as beside:
        if tokenizer is not None:
            write_tokenizer(tokenizer, beside, weights.config.max_seq_len, format == "hf")
            chat_files.write_chat(tokenizer, beside, format == "hf")
        if tokenizer is not None and format == "llama2c":
            llama2c.write_vocabulary(tokenizer, weights.config.vocab_size, beside / llama2c.VOCABULARY)
        writer(weights, beside, shards, report)


def _on_cpu(read: Callable[[str], Any], path: str) -> Any:
    return tree.map(Tensor.cpu, read(path))
