"""Tokens in a file to batches. A batch is a function of the file, a random key and the number of the step.

Files become documents in `texts.py`, documents tokens in `encode.py`, tokens a file in `shard.py`, and documents rows
in `packing.py`.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama_fn import random, tree
from llama_fn.random import Key
from llama_fn.ranges import integer
from llama_fn.shapes import typed
from llama_fn.tokenizer import Tokenizer
from llama_fn.training.encode import DialogTokens, encoded
from llama_fn.training.packing import MASK, ROUNDS, Rows, Span, beginnings, mixed, permuted, rows_of, spans
from llama_fn.training.shard import open_shard, write_shard
from llama_fn.training.texts import Document


class Batch(NamedTuple):
    """Rows of tokens, a mask of those to predict, and the segments of `forward`; None if the corpus is not packed."""

    tokens: Int[Tensor, "*b t"]
    mask: Bool[Tensor, "*b t"]
    segments: Int[Tensor, "*b t"] | None


class Corpus(NamedTuple):
    """The tokens of all documents, which of them are learned (None: all), and the rows that the documents fill.

    Document i begins at token ``begins[i]`` and has ``predictions[i]`` tokens after that one. Together, the rows
    predict every token of every document once, except the begin tokens.
    """

    tokens: np.ndarray
    learned: np.ndarray | None
    begins: np.ndarray
    predictions: np.ndarray
    rows: Rows
    bos_id: int
    context: int
    pack: bool


def encode_corpus(texts: Iterable[Document], tokenizer: Tokenizer, path: str | os.PathLike,
                  dialog_tokens: DialogTokens | None = None,
                  report: Callable[[int], None] = lambda count: None) -> int:
    """Write the tokens of all documents to one file, atomically, and return their number.

    The documents are encoded on all cores, and only a few are in memory at a time. ``dialog_tokens`` is that of
    `encode`. ``report`` is called with numbers of bytes of text that are done. Raises `OSError` that names the file
    and a remedy, and the errors of `encode`.

    Example: ``encode_corpus(texts, tokenizer, "train.bin")``.
    """
    return write_shard(path, tokenizer, encoded(texts, tokenizer, dialog_tokens, report))


def open_corpus(path: str | os.PathLike, tokenizer: Tokenizer, context: int, pack: bool = True,
                check: bool = True) -> Corpus:
    """Map a file of `encode_corpus` into memory, for rows that predict ``context`` tokens each.

    With ``pack``, a row holds as many documents as fit, and documents of more than ``context`` predictions are cut at
    other places in every epoch. Where all tokens are learned, a batch fills the space that is left in a row with the
    beginnings of other documents. Without ``pack``, a row holds one document, or a stretch of one, and padding.

    ``tokenizer`` must be the one that encoded the file. Raises `ValueError` for a context below 1, for a file without
    tokens, and for a file that `open_shard` refuses.

    Example: ``corpus = open_corpus("train.bin", tokenizer, context=256, pack=True)``.
    """
    context = integer("open_corpus: context", context, 1)
    tokens, ends, learned = open_shard(path, tokenizer, check)
    edges = np.concatenate([[0], ends]).astype(np.int64)
    rows = rows_of(predictions := np.diff(edges) - 1, context, pack)
    if not len(rows.document):
        raise ValueError(f"{path}: there is no token to predict in it")
    return Corpus(tokens, learned, edges[:-1], predictions, rows, tokenizer.bos_id, context, pack)


@typed
def batch(corpus: Corpus, key: Key, step: int, shape: tuple[int, int]) -> Batch:
    """The batch of a training step: a function of corpus, key and step alone.

    ``shape`` is (micro-batches, rows of each); the results have the axes "a b t", with context + 1 tokens in a row.

    The rows of steps 0, 1, 2, ... form one sequence, and each epoch is a stretch of it as long as the corpus has rows.
    An epoch is a permutation of the rows, drawn by the key and the number of the epoch. So every row comes exactly
    once, and every token is predicted once, beside the beginnings that fill rows. A batch may lie in several epochs.
    """
    step, count = integer("batch: step", step, 0), len(corpus.rows.first) - 1
    chosen, drawn = [], {}
    for place in range(step * shape[0] * shape[1], (step + 1) * shape[0] * shape[1]):
        epoch, within = divmod(place, count)
        if epoch not in drawn:
            drawn[epoch] = random.bits(random.fold_in(key, epoch), (ROUNDS + 1,)).tolist()
        *words, shift = drawn[epoch]
        row = permuted(within, count, words)
        chosen.append(_spans(corpus, row, shift if corpus.pack else 0))
        if corpus.pack and corpus.learned is None:
            space = corpus.context + 1 - sum(length + 1 for _, length in chosen[-1])
            chosen[-1] += [Span(int(corpus.begins[document]), length)
                           for document, length in beginnings(corpus.predictions, space, mixed(row + shift & MASK))]
    return tree.map(lambda x: x.unflatten(0, shape), _batch_of(corpus, chosen))


def rows(corpus: Corpus, size: int) -> Iterator[Batch]:
    """All rows in order, ``size`` at a time, with the axes "b t".

    The last batch is filled up with rows in which the mask is False.
    """
    count = len(corpus.rows.first) - 1
    for first in range(0, count, size):
        yield _batch_of(corpus, [_spans(corpus, row, 0) if row < count else [] for row in range(first, first + size)])


def _spans(corpus: Corpus, row: int, shift: int) -> list[Span]:
    """The stretches of tokens that a row holds."""
    found = []
    for item in range(corpus.rows.first[row], corpus.rows.first[row + 1]):
        document, number = int(corpus.rows.document[item]), int(corpus.rows.number[item])
        begin, predictions = int(corpus.begins[document]), int(corpus.predictions[document])
        found += spans(begin, predictions, number, corpus.context, shift)
    return found


def _batch_of(corpus: Corpus, chosen: list[list[Span]]) -> Batch:
    """The rows of these stretches. Each begins with the begin token, because every prompt does."""
    shape = (len(chosen), corpus.context + 1)
    tokens, mask, segments = np.zeros(shape, np.int64), np.zeros(shape, bool), np.full(shape, -1)
    for row, stretches in enumerate(chosen):
        at = 0
        for number, (start, length) in enumerate(stretches):
            place, end = slice(at, at + length + 1), start + length + 1
            tokens[row, place], segments[row, place] = corpus.tokens[start:end], number
            mask[row, place] = True if corpus.learned is None else corpus.learned[start:end]
            tokens[row, at], mask[row, at] = corpus.bos_id, False
            at += length + 1
    return Batch(torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(segments) if corpus.pack else None)
