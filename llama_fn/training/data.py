"""Data: from files to texts to one memory-mapped stream of tokens to batches that are a function of key and step."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama_fn import random
from llama_fn.checkpoint.atomic import replacing
from llama_fn.random import Key
from llama_fn.shapes import typed
from llama_fn.tokenizer import Tokenizer


def read_texts(path: str | os.PathLike) -> Iterator[str]:
    """The documents of a text file (one), of a JSON-lines file (the "text" of each line), or of all such in a folder.

    Raises `FileNotFoundError`, and `ValueError` that names the file and the place for bytes that are not UTF-8, for a
    line that is not JSON or has no "text", and for a folder or file without any text.
    """
    path, found = Path(path), False
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".jsonl") and p.is_file())
    for file in files:
        for text in _documents(file):
            if text.strip():
                found = True
                yield text
    if not found:
        raise ValueError(f"{path}: no text in it" + (" (looked for *.txt, *.md and *.jsonl)" if path.is_dir() else ""))


def _documents(file: Path) -> Iterator[str]:
    if file.suffix != ".jsonl":
        yield _decoded(file.read_bytes(), str(file))
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(_decoded(line, where))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f'{where}: a record needs a string under "text"')
            if any("\ud800" <= c <= "\udfff" for c in record["text"]):
                raise ValueError(f'{where}: the "text" holds half a surrogate pair, which is no character')
            yield record["text"]


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: byte 0x{data[error.start]:02X} at offset {error.start}; "
                         "convert the file to UTF-8 first") from None


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
        counts = torch.arange(corpus.context + 1) <= torch.from_numpy(lengths)[:, None]
        yield _window(corpus, corpus.starts[chosen]), counts


def _window(corpus: Corpus, starts: np.ndarray) -> Tensor:
    # The stream is a circle: a row that begins near its end goes on at its beginning.
    positions = (starts[..., None] + np.arange(corpus.context + 1)) % len(corpus.tokens)
    tokens = corpus.tokens[positions].astype(np.int64)
    tokens[..., 0] = corpus.bos_id  # in the middle of a long document, too: every prompt will begin with it
    return torch.from_numpy(tokens)


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
