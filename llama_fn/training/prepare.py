"""The files that a run learns from: a tokenizer, the tokens for training, and the tokens held out for validation."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from llama_fn import stories
from llama_fn.checkpoint.atomic import replacing
from llama_fn.checkpoint.load import TOKENIZER
from llama_fn.random import Key
from llama_fn.tokenizer import Tokenizer, load_tokenizer
from llama_fn.tokenizer_training import train_tokenizer
from llama_fn.training.data import encode_corpus, open_corpus
from llama_fn.training.encode import DialogTokens, cut
from llama_fn.training.manifest import FILES, MANIFEST, file_of
from llama_fn.training.texts import Document, as_bytes, documents, plain

VALIDATION_STORIES = 1000
FEW = 20  # documents; one in so many is held out
LEARNED_FROM = 1 << 26  # bytes of text, at most, for the tokenizer


ReportPreparing = Callable[[str, int, int | None], None]


class Sources(NamedTuple):
    """Three functions that give texts: for the tokenizer, for training, and held out. Each call begins anew.

    ``size`` is about how many bytes of text there are, if that is known.
    """

    tokenizer: Callable[[], Iterator[str]]
    train: Callable[[], Iterator[Document]]
    valid: Callable[[], Iterator[Document]]
    size: int | None = None


def sources_of_files(files: Sequence[Path]) -> Sources:
    """The documents of files.

    About one document in 20 is held out, chosen by its SHA-256: neither the order of the documents nor others beside it
    change where it belongs, and equal documents stay together. If there are fewer than 20, or none would be held out
    or left, the last twentieth of each plain text is held out, and one of every 20 prompts and dialogs, one at least.

    The tokenizer learns from all texts, or from evenly chosen parts of them if they have more than 64 MiB.
    """
    def every() -> Iterator[Document]:
        return chain.from_iterable(map(documents, files))

    @functools.cache
    def by_digest() -> bool:
        return _can_be_split(every())

    def part(last: bool) -> Iterator[Document]:
        if by_digest():
            return (document for document in every() if held_out(document) is last)
        return _few(list(every()), last)

    size = sum(file.stat().st_size for file in files)
    return Sources(lambda: _sampled(map(plain, part(last=False)), size), lambda: part(last=False),
                   lambda: part(last=True), size)


def held_out(document: Document) -> bool:
    """Whether a document is for validation: one in 20 is, by its digest alone."""
    return _number(document) % FEW == 0


def sources_of_stories(count: int, train: Key, held_out: Key) -> Sources:
    """``count`` stories from the key ``train`` for training, and 1000 stories from the key ``held_out``."""
    def training() -> Iterator[str]:
        return (story.text for story in stories.stories(train, count))

    return Sources(lambda: islice(training(), 5000), training,
                   lambda: (story.text for story in stories.stories(held_out, VALIDATION_STORIES)))


def prepare(folder: Path, vocab_size: int | None, sources: Sources | None, dialog_tokens: DialogTokens | None = None,
            report: ReportPreparing = lambda name, count, size: None) -> Tokenizer:
    """Make the files of a run that are missing, each atomically, and return the tokenizer.

    ``dialog_tokens`` is that of `encode`. ``report`` is called with the name of the file that is made, with the number
    of bytes of text that were encoded since the last call (0 when a file is begun), and with about how many there are.
    Raises `FileNotFoundError` if a file is missing and there are no sources to make it from.
    """
    missing = [name for name in FILES if not file_of(folder, name).is_file()]
    if missing and sources is None:
        raise FileNotFoundError(f"{folder / missing[0]}: no such file; resume with the texts of the run: it is made "
                                "again from them")
    if sources is not None and TOKENIZER in missing:
        report(TOKENIZER, 0, None)
        learned = train_tokenizer(sources.tokenizer(), vocab_size)
        with replacing(folder / TOKENIZER) as temporary:
            temporary.write_bytes(learned.model)
    tokenizer = load_tokenizer(file_of(folder, TOKENIZER))
    if sources is not None:
        parts = (("data/train.bin", sources.train, FEW - 1), ("data/valid.bin", sources.valid, 1))
        for name, texts, share in parts:
            if name in missing:
                size = None if sources.size is None else sources.size * share // FEW
                report(name, 0, size)
                encode_corpus(texts(), tokenizer, folder / name, dialog_tokens,
                              lambda count: report(name, count, size))  # noqa: B023, called before the next part
    return tokenizer


def clear(folder: Path, names: Sequence[str] = (MANIFEST, *FILES)) -> None:
    """Remove the files that `prepare` made for a run that could not begin, and folders that are then empty."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for part in (folder / "data", folder):
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()


def lowest_loss(folder: Path, tokenizer: Tokenizer, held_out: Key, context: int) -> float:
    """The lowest possible loss on the held-out stories: their entropy, in nats per token."""
    corpus = open_corpus(folder / "data" / "valid.bin", tokenizer, context)
    bits = sum(story.bits for story in stories.stories(held_out, VALIDATION_STORIES))
    return bits * math.log(2) / int(corpus.predictions.sum())


def _sampled(texts: Iterator[str], size: int) -> Iterator[str]:
    """About `LEARNED_FROM` of ``size`` bytes of text, evenly chosen: a tokenizer is learned in memory."""
    every = -(-size // LEARNED_FROM)
    return texts if every <= 1 else islice((part for text in texts for part in cut(text)), 0, None, every)


def _number(document: Document) -> int:
    """64 bits of a document's SHA-256."""
    return int.from_bytes(hashlib.sha256(as_bytes(document)).digest()[:8], "little")


def _can_be_split(documents: Iterator[Document]) -> bool:
    """Whether there are 20 documents, of which some are held out by their digests and some are not."""
    seen: set[bool] = set()
    for i, document in enumerate(documents, 1):
        seen.add(held_out(document))
        if i >= FEW and len(seen) == 2:
            return True
    return False


def _few(documents: list[Document], last: bool) -> Iterator[Document]:
    """The held-out part of documents if ``last``, otherwise the part for training."""
    whole = sorted((x for x in documents if not isinstance(x, str)), key=_number)
    if len(whole) == len(documents) == 1:
        raise ValueError("there is only one prompt or dialog: give two at least, one to learn from and one to hold out")
    count = -(-len(whole) // FEW)
    yield from whole[:count] if last else whole[count:]
    for text in (x for x in documents if isinstance(x, str)):
        cut = max(1, len(text) * 19 // 20)
        line = text.rfind("\n", cut * 9 // 10, cut) + 1  # cut at the beginning of a line, if one is near
        yield text[line or cut:] if last else text[:line or cut]
