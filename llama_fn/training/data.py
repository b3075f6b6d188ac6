"""Training data, in three stages: files to texts, texts to one file of tokens, tokens to batches.

The file of tokens is mapped into memory. A batch is a function of the file, a random key and the number of the step.
"""

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
    """The files that `read_texts` reads: ``path`` itself, or the text files in that folder and the folders below it.

    The files of a folder are sorted by their paths. Text files end in .txt, .md, .jsonl, .ndjson or .json, in upper or
    lower case. One warning names the other files. The folder ``leave_out`` is skipped. Raises `FileNotFoundError`.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        return [path]
    files = []
    for folder, folders, names in os.walk(path, onerror=_raise):  # rglob would skip an unreadable folder in silence
        folders[:] = [name for name in folders if leave_out is None or (Path(folder) / name).resolve() != leave_out]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # not followed
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

    A .jsonl or .ndjson file has one record in each line. A .json file is a list of records, a single record, or has
    one record in each line. A record is an object with a string under "text". Any other file is one document.

    Raises `FileNotFoundError`. Raises `ValueError` that names the file and the line or record for text that is not
    UTF-8, for wrong JSON, and for a record without a text. Raises `ValueError` for a file or folder without any text.

    Example: ``tokenizer = lf.train_tokenizer(read_texts("my-texts/"), vocab_size=1024)``.
    """
    found = False
    for file in text_files(path):
        for text in documents(file):
            found = True
            yield text
    if not found:
        raise no_text(path)


def documents(file: Path) -> Iterator[str]:
    """The documents of one file, without those that are only white space."""
    texts = map(_text, _records(file)) if file.suffix.lower() in JSON else [read_text(file)]
    return (text for text in texts if text.strip())


def no_text(path: str | os.PathLike) -> ValueError:
    """The error for a file or folder without any text."""
    return ValueError(f"{path}: no text in it" + (f" (looked for {_globs()})" if Path(path).is_dir() else ""))


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a JSON file, after the place where it stands ("FILE, line 3")."""
    if file.suffix.lower() != ".json":
        yield from json_lines(file)
        return
    try:
        value = read_json(file)
    except ValueError as error:
        if "Extra data" not in str(error):  # a second value follows: one record in each line, in spite of the name
            raise
        yield from json_lines(file)
        return
    yield from ((f"{file}, record {i}", x) for i, x in enumerate(value, 1)) if isinstance(value, list) else [
        (str(file), value)]


def _text(located: tuple[str, Any]) -> str:
    """The text of a record that `_records` gave."""
    where, record = located
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
    """Write the tokens of all texts to one file, and return the number of tokens.

    Each text has its begin and end token. The file is a flat array of unsigned integers: of 16 bits if the vocabulary
    fits, otherwise of 32. The write is atomic. Raises `OSError` that names the file and a remedy.

    Example: ``encode_corpus(texts, tokenizer, "train.bin")``.
    """
    count = 0
    with replacing(path) as beside, beside.open("wb") as file:
        for text in texts:
            tokens = np.array(tokenizer.encode(text, bos=True, eos=True), _dtype(tokenizer))
            file.write(tokens.tobytes())
            count += len(tokens)
    return count


class Corpus(NamedTuple):
    """The tokens of all documents, and how they are cut into rows for training.

    A row begins at the first token of a document. A document longer than ``context`` is cut into several rows. Row i
    starts at token ``starts[i]`` and predicts the ``lengths[i]`` tokens after it. Together the rows predict every
    token of every document once, except the begin tokens. A batch may shift row i by up to ``slack[i]`` tokens to the
    right, so that a long document is cut at other places in every epoch.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    slack: np.ndarray
    bos_id: int
    context: int


def open_corpus(path: str | os.PathLike, tokenizer: Tokenizer, context: int) -> Corpus:
    """Map a file of `encode_corpus` into memory, for rows that predict ``context`` tokens each.

    ``tokenizer`` must be the one that encoded the file. Raises `ValueError` for a context below 1.

    Example: ``corpus = open_corpus("train.bin", tokenizer, context=256)``.
    """
    if context < 1:
        raise ValueError(f"open_corpus: context must be at least 1, got {context}")
    tokens = np.memmap(path, dtype=_dtype(tokenizer), mode="r")
    begins = np.flatnonzero(tokens == tokenizer.bos_id)
    predictions = np.diff(np.append(begins, len(tokens))) - 1
    counts = -(-predictions // context)  # rows of each document
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a row within its document
    starts = np.repeat(begins, counts) + number * context
    left = np.repeat(predictions, counts) - number * context
    return Corpus(tokens, starts, np.minimum(left, context), np.clip(left - context, 0, context),
                  tokenizer.bos_id, context)


@typed
def batch(corpus: Corpus, key: Key, step: int,
          shape: tuple[int, int]) -> tuple[Int[Tensor, "a b t"], Bool[Tensor, "a b t"]]:
    """The tokens of one training step, and a mask of the tokens to predict.

    ``shape`` is (micro-batches, rows of each); the results have the axes "a b t", with context + 1 tokens in a row.
    The result depends on corpus, key and step alone. Each row is drawn uniformly and with replacement. A row that is
    longer than its document continues with the next documents. Begin tokens are not predicted.
    """
    bits = random.bits(random.fold_in(key, step), (2, *shape)).numpy()
    chosen = (bits[0] * len(corpus.starts)) >> 32
    starts = corpus.starts[chosen] + ((bits[1] * (corpus.slack[chosen] + 1)) >> 32)
    tokens = _rows_at(corpus, starts)
    return tokens, tokens != corpus.bos_id


def rows(corpus: Corpus, size: int) -> Iterator[tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]]:
    """All rows in order, ``size`` at a time, each batch with a mask of the tokens to predict.

    The last batch is filled up with rows in which the mask is False.
    """
    for first in range(0, len(corpus.starts), size):
        chosen = np.arange(first, first + size) % len(corpus.starts)
        lengths = np.where(np.arange(first, first + size) < len(corpus.starts), corpus.lengths[chosen], 0)
        counts = torch.arange(corpus.context + 1, device="cpu") <= torch.from_numpy(lengths)[:, None]
        yield _rows_at(corpus, corpus.starts[chosen]), counts


def _rows_at(corpus: Corpus, starts: np.ndarray) -> Tensor:
    # A row that reaches the end of the tokens continues at their beginning.
    positions = (starts[..., None] + np.arange(corpus.context + 1)) % len(corpus.tokens)
    tokens = corpus.tokens[positions].astype(np.int64)
    tokens[..., 0] = corpus.bos_id  # also within a long document, because every prompt begins so
    return torch.from_numpy(tokens)


def _dtype(tokenizer: Tokenizer) -> type:
    """The dtype of token ids in the file."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
