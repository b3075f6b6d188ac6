"""Data: from files to texts to one memory-mapped stream of tokens to batches that are a function of key and step."""

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama_fn import random
from llama_fn.checkpoint.atomic import replacing
from llama_fn.random import Key
from llama_fn.shapes import typed
from llama_fn.text import json_lines, read_json, read_text
from llama_fn.tokenizer import Tokenizer

JSON = (".json", ".jsonl", ".ndjson")
READ = (".txt", ".md", *JSON)


def text_files(path: str | os.PathLike, leave_out: Path | None = None) -> list[Path]:
    """The file itself, or all files of a folder and its folders that `read_texts` reads, in order.

    Of a folder these are *.txt, *.md, *.jsonl, *.ndjson and *.json, in capital letters too; one warning names the
    others. What lies in `leave_out` is not looked at. Raises `FileNotFoundError`.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        return [path]
    files = []
    for folder, folders, names in os.walk(path, onerror=_raise):  # rglob says nothing of a folder that it cannot read
        folders[:] = [name for name in folders if leave_out is None or (Path(folder) / name).resolve() != leave_out]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # which are not followed
        files += [Path(folder) / name for name in (*names, *links)]
    read = sorted(file for file in files if file.suffix.lower() in READ and file.is_file())
    others = [str(file.relative_to(path)) for file in sorted({*files} - {*read})]
    if others and read:
        more = f" and {len(others) - 3:,} more" if len(others) > 4 else ""
        warnings.warn(f"{path}: not read: {', '.join(others[:3] if more else others)}{more} (only {_globs()} are)",
                      stacklevel=2)
    return read


def read_texts(path: str | os.PathLike) -> Iterator[str]:
    """The documents of a file, or of all `text_files` of a folder, one after another.

    A *.jsonl or *.ndjson file holds a record a line, a *.json file a list of records, one record, or a record a line;
    a record is an object with a string under "text". Any other file is one document.
    Raises `FileNotFoundError`, and `ValueError` that names the file and the place for what `llama_fn.text` refuses, for
    a record without a text, and for a file or folder without any text.
    """
    found = False
    for file in text_files(path):
        for text in documents(file):
            found = True
            yield text
    if not found:
        raise no_text(path)


def documents(file: Path) -> Iterator[str]:
    """The documents of one file that are more than white space."""
    texts = map(_text, _records(file)) if file.suffix.lower() in JSON else [read_text(file)]
    return (text for text in texts if text.strip())


def no_text(path: str | os.PathLike) -> ValueError:
    """The error for a file or folder without any text."""
    return ValueError(f"{path}: no text in it" + (f" (looked for {_globs()})" if Path(path).is_dir() else ""))


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """Where each record of a JSON file stands, and the record."""
    if file.suffix.lower() != ".json":
        yield from json_lines(file)
        return
    try:
        value = read_json(file)
    except ValueError as error:
        if "Extra data" not in str(error):  # a second value: what many call .json holds a record a line
            raise
        yield from json_lines(file)
        return
    yield from ((f"{file}, record {i}", x) for i, x in enumerate(value, 1)) if isinstance(value, list) else [
        (str(file), value)]


def _text(place: tuple[str, Any]) -> str:
    where, record = place
    if not isinstance(record, dict) or not isinstance(text := record.get("text"), str):
        raise ValueError(f'{where}: a record needs a string under "text"')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'{where}: the "text" holds half a surrogate pair, which is no character') from None
    return text


def _globs() -> str:
    *most, last = (f"*{suffix}" for suffix in READ)
    return f"{', '.join(most)} and {last}"


def _raise(error: OSError) -> None:
    raise error


def encode_corpus(texts: Iterable[str], tokenizer: Tokenizer, path: str | os.PathLike) -> int:
    """Write every text's tokens, begin and end included, to one flat file of unsigned integers; return their number.

    The file is written beside `path` and renamed, so that it is whole or not there.
    """
    count = 0
    with replacing(path) as beside, beside.open("wb") as file:
        for text in texts:
            tokens = np.array(tokenizer.encode(text, bos=True, eos=True), _dtype(tokenizer))
            file.write(tokens.tobytes())
            count += len(tokens)
    return count


class Corpus(NamedTuple):
    """A stream of documents, cut into rows that each begin a document, or continue one longer than the context.

    Row i predicts the `lengths[i]` tokens after `starts[i]`: together the rows predict every token of every document
    once, and no document's beginning. `slack[i]` is how far row i may slide to vary where a long document is cut.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    slack: np.ndarray
    bos_id: int
    context: int


def open_corpus(path: str | os.PathLike, tokenizer: Tokenizer, context: int) -> Corpus:
    """Map the file of `encode_corpus` into memory, for rows of `context` predictions."""
    if context < 1:
        raise ValueError(f"open_corpus: context must be at least 1, got {context}")
    tokens = np.memmap(path, dtype=_dtype(tokenizer), mode="r")
    begins = np.flatnonzero(tokens == tokenizer.bos_id)
    predictions = np.diff(np.append(begins, len(tokens))) - 1
    rows = -(-predictions // context)
    piece = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    starts = np.repeat(begins, rows) + piece * context
    left = np.repeat(predictions, rows) - piece * context
    return Corpus(tokens, starts, np.minimum(left, context), np.clip(left - context, 0, context),
                  tokenizer.bos_id, context)


@typed
def batch(corpus: Corpus, key: Key, step: int,
          shape: tuple[int, int]) -> tuple[Int[Tensor, "a b t"], Bool[Tensor, "a b t"]]:
    """The tokens of a training step, and which of them count: a function of corpus, key and step alone.

    Rows are drawn evenly, with replacement, and run on into the documents that follow; no document's begin counts.
    """
    words = random.bits(random.fold_in(key, step), (2, *shape)).numpy()
    chosen = (words[0] * len(corpus.starts)) >> 32
    starts = corpus.starts[chosen] + ((words[1] * (corpus.slack[chosen] + 1)) >> 32)
    tokens = _window(corpus, starts)
    return tokens, tokens != corpus.bos_id


def rows(corpus: Corpus, size: int) -> Iterator[tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]]:
    """All rows in order, `size` at a time (the last batch filled up with rows that do not count)."""
    for first in range(0, len(corpus.starts), size):
        chosen = np.arange(first, first + size) % len(corpus.starts)
        lengths = np.where(np.arange(first, first + size) < len(corpus.starts), corpus.lengths[chosen], 0)
        counts = torch.arange(corpus.context + 1, device="cpu") <= torch.from_numpy(lengths)[:, None]
        yield _window(corpus, corpus.starts[chosen]), counts


def _window(corpus: Corpus, starts: np.ndarray) -> Tensor:
    # The stream is a circle: a row that begins near its end goes on at its beginning.
    positions = (starts[..., None] + np.arange(corpus.context + 1)) % len(corpus.tokens)
    tokens = corpus.tokens[positions].astype(np.int64)
    tokens[..., 0] = corpus.bos_id  # in the middle of a long document, too: every prompt will begin with it
    return torch.from_numpy(tokens)


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
