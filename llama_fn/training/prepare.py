"""The files that a run learns from: a tokenizer, the tokens for training, and the tokens held out for validation."""

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
from llama_fn.training.data import documents, encode_corpus, open_corpus
from llama_fn.training.manifest import FILES, MANIFEST, file_of

VALIDATION_STORIES = 1000


class Sources(NamedTuple):
    """Three functions that give texts: for the tokenizer, for training, and held out. Each call begins anew."""

    tokenizer: Callable[[], Iterator[str]]
    train: Callable[[], Iterator[str]]
    valid: Callable[[], Iterator[str]]


def sources_of_files(files: Sequence[Path]) -> Sources:
    """The documents of files.

    Every twentieth document is held out. If there are fewer than 20, the last twentieth of each one is held out.
    """
    def part(last: bool) -> Iterator[str]:
        return _split(chain.from_iterable(map(documents, files)), last)

    return Sources(lambda: part(last=False), lambda: part(last=False), lambda: part(last=True))


def sources_of_stories(count: int, train: Key, held_out: Key) -> Sources:
    """``count`` stories from the key ``train`` for training, and 1000 stories from the key ``held_out``."""
    def training() -> Iterator[str]:
        return (story.text for story in stories.stories(train, count))

    return Sources(lambda: islice(training(), 5000), training,
                   lambda: (story.text for story in stories.stories(held_out, VALIDATION_STORIES)))


def prepare(folder: Path, vocab_size: int | None, sources: Sources | None) -> Tokenizer:
    """Make the files of a run that are missing, each atomically, and return the tokenizer.

    Raises `FileNotFoundError` if a file is missing and there are no sources to make it from.
    """
    missing = [name for name in FILES if not file_of(folder, name).is_file()]
    if missing and sources is None:
        raise FileNotFoundError(f"{folder / missing[0]}: no such file; resume with the texts of the run: it is made "
                                "again from them")
    if sources is not None and TOKENIZER in missing:
        learned = train_tokenizer(sources.tokenizer(), vocab_size)
        with replacing(folder / TOKENIZER) as temporary:
            temporary.write_bytes(learned.model)
    tokenizer = load_tokenizer(file_of(folder, TOKENIZER))
    if sources is not None:
        for name, texts in (("data/train.bin", sources.train), ("data/valid.bin", sources.valid)):
            if name in missing:
                encode_corpus(texts(), tokenizer, folder / name)
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
    return bits * math.log(2) / int(corpus.lengths.sum())


def _split(texts: Iterator[str], last: bool) -> Iterator[str]:
    """The held-out part of texts if ``last``, otherwise the part for training."""
    few = list(islice(texts, 20))
    if len(few) == 20:
        yield from (text for i, text in enumerate(chain(few, texts)) if (i % 20 == 19) is last)
        return
    for text in few:
        cut = max(1, len(text) * 19 // 20)
        line = text.rfind("\n", cut * 9 // 10, cut) + 1  # cut at the beginning of a line, if one is near
        yield text[line or cut:] if last else text[:line or cut]
