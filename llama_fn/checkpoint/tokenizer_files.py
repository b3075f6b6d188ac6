"""Reading and writing the files of a tokenizer in a model's folder.

``tokenizer.model`` is SentencePiece's file. If it is missing, Hugging Face's ``tokenizer.json`` is read. The added
tokens are listed in ``tokenizer_config.json``, ``added_tokens.json`` and ``tokenizer.json``.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_fn import tokenizer_json
from llama_fn.checkpoint.atomic import COMPLETE
from llama_fn.checkpoint.files import inside, read_json, write_json
from llama_fn.checkpoint.write_errors import explaining_errors
from llama_fn.sentencepiece_model import pieces_of, settings_of
from llama_fn.tokenizer import LARGEST_JSON, Tokenizer, load_tokenizer, tokenizer_of_json

MODEL, JSON, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"  # transformers before version 5 wrote them
FILES = (MODEL, JSON, SETTINGS, ADDED, SPECIAL)


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder; None if there is none.

    It may lie in the parent folder, as in Meta's download. ``vocab_size`` is the number of rows of the weights; rows
    without a token become tokens with an empty name. Raises `ValueError` if the tokenizer has more tokens than that.
    Warns of added tokens beyond the last row, which are left out. Warns of a ``tokenizer.json`` that is not of LLaMA's
    kind, and returns None for it.
    """
    settings = _object(folder, SETTINGS)
    found = _read_file(folder, settings)
    if found is None:
        return None
    file, tokenizer = found
    size = tokenizer.processor.vocab_size()
    if size > vocab_size:
        raise ValueError(f"{file}: a vocabulary of {size} tokens does not fit weights for {vocab_size} in {folder}; "
                         "use the tokenizer that came with them")
    named = {id: (name, is_special) for id, (name, is_special) in _added(folder, settings).items()
             if (bool(name) if id >= size else tokenizer.processor.id_to_piece(id) != name)}
    if left_out := sorted(id for id in named if id >= vocab_size):
        warnings.warn(f"{folder}: the weights have {vocab_size} rows, so {len(left_out)} added tokens are left out: "
                      + ", ".join(f"{named.pop(id)[0]!r} ({id})" for id in left_out), stacklevel=2)
    names = dict.fromkeys(range(size, vocab_size), "") | {id: name for id, (name, _) in named.items()}
    legacy = settings.get("legacy")
    if not isinstance(legacy, bool):
        legacy = tokenizer.legacy and not str(settings.get("tokenizer_class")).startswith(("Llama", "CodeLlama"))
    return Tokenizer(tokenizer.model, tuple(sorted(names.items())),
                     tuple(sorted(id for id, (name, is_special) in named.items() if name and is_special)), legacy)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_len: int, for_transformers: bool) -> None:
    """Write a tokenizer's files. ``max_len`` is the number of tokens in the model's context.

    transformers ignores some settings in SentencePiece's file, so that a folder for transformers also gets a
    ``tokenizer.json`` that encodes as this tokenizer does. Warns if some setting cannot be expressed there. There is
    one exception without a warning: if ``legacy`` is false and a text begins with a space, transformers omits the
    space that this tokenizer puts before a text.
    """
    with explaining_errors(folder / MODEL):
        (folder / MODEL).write_bytes(tokenizer.model)
    if not for_transformers and not tokenizer.added and tokenizer.legacy:
        return
    settings, pieces = settings_of(tokenizer.model), pieces_of(tokenizer.model)
    last = max((id for id, name in tokenizer.added if name), default=-1)
    added = {id: (name or _unused(id), id in tokenizer.special or not name) for id, name in tokenizer.added
             if id <= last}  # transformers needs ids without a gap
    unusual = settings.unusual()
    if for_transformers and unusual:
        warnings.warn("transformers will encode some texts otherwise than this tokenizer, whose SentencePiece model "
                      f"has {', '.join(unusual)}", stacklevel=2)
    elif for_transformers:
        content = tokenizer_json.written(pieces, added, settings.dummy_prefix, tokenizer.legacy, tokenizer.bos_id)
        with explaining_errors(folder / JSON):
            (folder / JSON).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.processor.unk_id()}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    write_json(folder / SETTINGS, {
        "tokenizer_class": "LlamaTokenizer" if unusual else "PreTrainedTokenizerFast",
        **{f"{name}_token": pieces[id].text for name, id in ids.items() if id >= 0},
        "add_bos_token": ids["bos"] >= 0, "add_eos_token": False, "add_prefix_space": settings.dummy_prefix,
        "legacy": tokenizer.legacy, "clean_up_tokenization_spaces": False, "model_max_length": max_len,
        "added_tokens_decoder": {str(id): {"content": name, **flags, "special": is_special}
                                 for id, (name, is_special) in added.items()}})


def _read_file(folder: Path, settings: Mapping[str, Any]) -> tuple[Path, Tokenizer] | None:
    """The file that holds the tokenizer, and the tokenizer without its added tokens; None if there is no such file."""
    above = folder.resolve().parents[folder.name == COMPLETE]
    if (folder / MODEL).exists() or (folder / MODEL).is_symlink():
        file = inside(folder, MODEL, above)
    elif (folder / JSON).exists() or (folder / JSON).is_symlink():
        file = inside(folder, JSON)
        content = read_json(file, LARGEST_JSON)
        names = (_content(settings.get(f"{name}_token")) or usual for name, usual in (("bos", "<s>"), ("eos", "</s>")))
        try:
            return file, tokenizer_of_json(content, *names)
        except ValueError as error:
            warnings.warn(f"{file}: the model is loaded without a tokenizer: {error}", stacklevel=2)
            return None
    elif (above / MODEL).exists():
        file = inside(above, MODEL)
    else:
        return None
    return file, load_tokenizer(file)


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """The added tokens in Hugging Face's files: for each id its name, and whether it is special."""
    special = set(_names({**_object(folder, SPECIAL), **settings}))
    decoder = settings.get("added_tokens_decoder") or {}
    try:
        listed = [{**token, "id": int(id)} for id, token in decoder.items()]
        older = [{"id": id, "content": name, "special": name in special}
                 for name, id in _object(folder, ADDED).items()]
        found = tokenizer_json.added_tokens(_object(folder, JSON))
        found |= tokenizer_json.added_tokens({"added_tokens": older + listed})
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder}: the added tokens of {SETTINGS}, {ADDED} or {JSON} cannot be read: "
                         f"{error}") from None
    # `write_tokenizer` gives a token with an empty name this name.
    return {id: ("" if name == _unused(id) else name, is_special) for id, (name, is_special) in found.items()}


def _unused(id: int) -> str:
    """The name in Hugging Face's files of a token that has an empty name here."""
    return f"<|unused_{id}|>"


def _names(settings: Mapping[str, Any]) -> Iterator[str]:
    """The names of special tokens in settings such as ``pad_token`` and ``additional_special_tokens``."""
    for name, value in settings.items():
        if name.endswith("_token"):
            yield _content(value)
        elif name.endswith("_special_tokens"):
            yield from map(_content, value.values() if isinstance(value, Mapping) else value or [])


def _content(token: Any) -> str:
    """The name of a token, which is a text or an object with a "content"; an empty text for anything else."""
    name = token.get("content") if isinstance(token, Mapping) else token
    return name if isinstance(name, str) else ""


def _object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder; empty if there is no such file."""
    there = (folder / name).exists() or (folder / name).is_symlink()
    return read_json(inside(folder, name), LARGEST_JSON) if there else {}
