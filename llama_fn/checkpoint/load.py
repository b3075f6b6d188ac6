"""A model in and out of a folder: its parameters and its tokenizer."""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from llama_fn.checkpoint import meta
from llama_fn.checkpoint.files import replacing
from llama_fn.model.transformer import Params
from llama_fn.tokenizer import Tokenizer, load_tokenizer

EMBEDDED = {"stories": Path(__file__).parent.parent / "stories" / "model"}
TOKENIZER = "tokenizer.model"


class Model(NamedTuple):
    """A language model: text to tokens to logits, and back."""

    params: Params
    tokenizer: Tokenizer


def load(path_or_name: str | os.PathLike, *, dtype: torch.dtype | None = None,
         device: torch.device | str | None = None) -> Model:
    """The embedded model "stories" (by this string), or the model of a folder in Meta's layout.

    `dtype` None keeps the weights as they are stored. The tokenizer lies with the weights or, as in Meta's download,
    one folder above. Raises `FileNotFoundError` and `ValueError`, naming the file and what is wrong with it.
    """
    folder = Path(path_or_name)
    if isinstance(path_or_name, str) and path_or_name in EMBEDDED:
        if (folder / meta.SETTINGS).is_file():
            raise ValueError(f"{path_or_name} is an embedded model and a folder here; "
                             f"for the folder say ./{path_or_name}")
        folder = EMBEDDED[path_or_name]
    if not (folder / meta.SETTINGS).is_file():
        raise FileNotFoundError(f"{path_or_name}: no model there: expected the name of an embedded model "
                                f"({', '.join(EMBEDDED)}), or a folder with {meta.SETTINGS} and {meta.WEIGHTS}")
    file = next((f for f in (folder / TOKENIZER, folder.parent / TOKENIZER) if f.is_file()), folder / TOKENIZER)
    tokenizer = load_tokenizer(file)
    params = meta.load_meta(folder, dtype, device)
    if tokenizer.vocab_size != params.config.vocab_size:
        raise ValueError(f"{file}: a vocabulary of {tokenizer.vocab_size} tokens does not fit weights for "
                         f"{params.config.vocab_size} in {folder}; use the tokenizer that came with them")
    return Model(params, tokenizer)


def save(model: Model, path: str | os.PathLike, *, format: Literal["meta"] = "meta") -> None:
    """Write a model to a folder, in Meta's layout, so that `load` reads it back bit for bit.

    Every file is written beside its place; all are renamed at the end, so that a model there stays until then.
    """
    if format != "meta":
        raise ValueError(f"save: unknown format {format!r}, only 'meta' is known")
    with replacing(Path(path) / TOKENIZER) as beside:
        beside.write_bytes(model.tokenizer.model)
        meta.save_meta(model.params, path)
