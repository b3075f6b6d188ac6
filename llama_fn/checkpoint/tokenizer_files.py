"""A tokenizer in and out of a model's folder.

`tokenizer.model` is SentencePiece's file. Where it is missing, Hugging Face's `tokenizer.json` is read. Which tokens
were added, `tokenizer_config.json`, `added_tokens.json` and `tokenizer.json` say.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_fn import tokenizer_json
from llama_fn.checkpoint.atomic import COMPLETE, explaining_errors
from llama_fn.checkpoint.files import inside, read_json, write_json
from llama_fn.sentencepiece_model import pieces_of, settings_of
from llama_fn.tokenizer import LARGEST_JSON, Tokenizer, load_tokenizer, tokenizer_of_json

MODEL, JSON, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"  # of transformers before 5
FILES = (MODEL, JSON, SETTINGS, ADDED, SPECIAL)


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder, or, as in Meta's download, of the one above; None if there is none.

    The weights have `vocab_size` rows; those without a token are tokens without a name. Raises `ValueError` for more
    tokens than rows. Added tokens beyond the rows are left out, with a warning; a `tokenizer.json` of another kind
    than LLaMA's is none, with a warning.
    """
    settings = _object(folder, SETTINGS)
    found = _found(folder, settings)
    if found is None:
        return None
    file, tokenizer = found
    size = tokenizer.processor.vocab_size()
    if size > vocab_size:
        raise ValueError(f"{file}: a vocabulary of {size} tokens does not fit weights for {vocab_size} in {folder}; "
                         "use the tokenizer that came with them")
    named = {id: (name, is_special) for id, (name, is_special) in _added(folder, settings).items()
             if (bool(name) if id >= size else tokenizer.processor.id_to_piece(id) != name)}
    if beyond := sorted(id for id in named if id >= vocab_size):
        warnings.warn(f"{folder}: the weights have {vocab_size} rows, so {len(beyond)} added tokens are left out: "
                      + ", ".join(f"{named.pop(id)[0]!r} ({id})" for id in beyond), stacklevel=2)
    names = dict.fromkeys(range(size, vocab_size), "") | {id: name for id, (name, _) in named.items()}
    legacy = settings.get("legacy")
    if not isinstance(legacy, bool):
        legacy = tokenizer.legacy and not str(settings.get("tokenizer_class")).startswith(("Llama", "CodeLlama"))
    return Tokenizer(tokenizer.model, tuple(sorted(names.items())),
                     tuple(sorted(id for id, (name, is_special) in named.items() if name and is_special)), legacy)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_len: int, for_transformers: bool) -> None:
    """Write a tokenizer's files. `max_len` is the model's context.

    For transformers, which does not take every setting from SentencePiece's file, a `tokenizer.json` encodes as this
    tokenizer does. What none can say is a warning. One exception is told here alone: where `legacy` is false and a
    text begins with a space, transformers leaves out the space that this tokenizer puts before the text.
    """
    with explaining_errors(folder / MODEL):
        (folder / MODEL).write_bytes(tokenizer.model)
    if not for_transformers and not tokenizer.added and tokenizer.legacy:
        return
    settings, pieces = settings_of(tokenizer.model), pieces_of(tokenizer.model)
    last = max((id for id, name in tokenizer.added if name), default=-1)
    added = {id: (name or _unused(id), id in tokenizer.special or not name) for id, name in tokenizer.added
             if id <= last}  # transformers numbers added tokens without a gap
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


def _found(folder: Path, settings: Mapping[str, Any]) -> tuple[Path, Tokenizer] | None:
    """The file that the tokenizer is read from, and what it says."""
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
    """Name, and whether it is special, of every token that a file of Hugging Face's names, by id."""
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
    # A name that `write_tokenizer` puts where there is none.
    return {id: ("" if name == _unused(id) else name, is_special) for id, (name, is_special) in found.items()}


def _unused(id: int) -> str:
    return f"<|unused_{id}|>"


def _names(settings: Mapping[str, Any]) -> Iterator[str]:
    """The names of special tokens, as `pad_token` and lists as `additional_special_tokens` tell them."""
    for name, value in settings.items():
        if name.endswith("_token"):
            yield _content(value)
        elif name.endswith("_special_tokens"):
            yield from map(_content, value.values() if isinstance(value, Mapping) else value or [])


def _content(token: Any) -> str:
    """The name of a token, which may be written out with its flags; "" for anything else."""
    name = token.get("content") if isinstance(token, Mapping) else token
    return name if isinstance(name, str) else ""


def _object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder; empty if there is no such file."""
    there = (folder / name).exists() or (folder / name).is_symlink()
    return read_json(inside(folder, name), LARGEST_JSON) if there else {}
