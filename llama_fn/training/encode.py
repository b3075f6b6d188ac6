"""Documents to tokens, and which of them are learned; on all cores."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llama_fn.tokenizer import Tokenizer
from llama_fn.training.texts import Dialog, Document, Prompt, plain

DialogTokens = Callable[[Tokenizer, Sequence[Any]], tuple[Any, Any]]  # `lf.dialog_tokens`: tokens and mask
A = TypeVar("A")
B = TypeVar("B")
PIECE = 1 << 16  # characters that SentencePiece gets at a time: of 4 MB at once it takes 400 MB and three times as long
CHUNK = 1 << 18  # characters of the documents that a thread gets at a time


class Encoded(NamedTuple):
    """The tokens of a document "t", and which of them are learned "t"; None if all are."""

    tokens: np.ndarray
    learned: np.ndarray | None


def encode(document: Document, tokenizer: Tokenizer, dialog_tokens: DialogTokens | None = None) -> Encoded:
    """The tokens of a document, with its begin and end token, and which of them are learned.

    - All of a plain text is learned.
    - Of a prompt with a completion, the tokens are those of the joined text. The completion and the end token are
      learned. A token in which the two meet belongs to the completion.
    - A dialog is encoded by ``dialog_tokens``; pass `lf.dialog_tokens` for LLaMA 2's format, where the answers and
      their end tokens are learned.

    Raises `ValueError` for a dialog without ``dialog_tokens``, and for one that it refuses.
    """
    if isinstance(document, Dialog):
        if dialog_tokens is None:
            raise ValueError("dialogs need a function for their tokens: pass dialog_tokens=lf.dialog_tokens")
        try:
            tokens, mask = dialog_tokens(tokenizer, document.messages)
        except ValueError as error:
            raise ValueError(f"the dialog that begins {document.messages[0]['content'][:40]!r}: {error}") from None
        return Encoded(np.asarray(tokens, np.int64), np.asarray(mask, bool))
    if isinstance(document, Prompt):
        prompt = tokenizer.encode(document.prompt)
        whole = tokenizer.encode("".join(document), eos=True)
        alike = next((i for i, (x, y) in enumerate(zip(prompt, whole, strict=False)) if x != y), len(prompt))
        return Encoded(np.array(whole), np.arange(len(whole)) >= alike)
    return Encoded(_text_tokens(document, tokenizer), None)


def _text_tokens(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """``tokenizer.encode(text, bos=True, eos=True)``, in pieces that end where lines end.

    A piece is encoded with a newline before it, because the tokenizer adds a space to the beginning of a text. In a
    vocabulary in which no token has characters on both sides of a line end, the result is exactly the same.
    """
    pieces, newline = list(cut(text)), tokenizer.encode("\n", bos=False)
    ids = [np.array(tokenizer.encode(pieces[0], bos=True), np.int64)]
    for piece in pieces[1:]:
        own = tokenizer.encode("\n" + piece, bos=False)
        if own[:len(newline)] != newline:  # a token joins the newline with what follows
            return np.array(tokenizer.encode(text, bos=True, eos=True), np.int64)
        ids.append(np.array(own[len(newline):], np.int64))
    end = tokenizer.encode("", bos=False, eos=True)
    return np.concatenate([*ids, np.array(end, np.int64)])


def cut(text: str) -> Iterator[str]:
    """The text in pieces of `PIECE` characters and the rest of the line; there is one at least."""
    at = 0
    while (end := text.find("\n", at + PIECE) + 1) and end < len(text):
        yield text[at:end]
        at = end
    yield text[at:]


def encoded(documents: Iterable[Document], tokenizer: Tokenizer, dialog_tokens: DialogTokens | None = None,
            report: Callable[[int], None] = lambda count: None) -> Iterator[Encoded]:
    """`encode` of each document, in order, computed by a thread on each core.

    SentencePiece lets other threads run while it encodes, so that threads serve as well as processes. Only a few
    documents are ahead of the one that is given. ``report`` is called with numbers of bytes of text that are done.
    """
    def of_chunk(chunk: list[Document]) -> list[Encoded]:
        return [encode(document, tokenizer, dialog_tokens) for document in chunk]

    for chunk, results in ahead(of_chunk, _chunks(documents)):
        yield from results
        report(sum(len(plain(document).encode()) for document in chunk))


def ahead(f: Callable[[A], B], items: Iterable[A]) -> Iterator[tuple[A, B]]:
    """Each item with its result, in order, computed by a thread on each core, at most two items a thread ahead."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: collections.deque[tuple[A, Future[B]]] = collections.deque()
    pool = ThreadPoolExecutor(cores)
    try:
        for item in items:
            waiting.append((item, pool.submit(f, item)))
            if len(waiting) > 2 * cores:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:  # after an error or Ctrl-C, what has not begun is left out
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents, many short ones or a long one at a time."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(plain(document))
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
