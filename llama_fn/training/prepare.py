"""What a run learns from, in its folder: a tokenizer, and the texts as tokens, for training and held out."""

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
from llama_fn.training.record import FILES, RECORD, place

VALIDATION_STORIES = 1000


class Sources(NamedTuple):
    """Texts, from their beginning at every call: for the tokenizer, for training, and held out."""

    tokenizer: Callable[[], Iterator[str]]
    train: Callable[[], Iterator[str]]
    valid: Callable[[], Iterator[str]]


def sources_of_files(files: Sequence[Path]) -> Sources:
    """The documents of files. Every twentieth is held out; of fewer than 20, the last twentieth of each."""
    def part(last: bool) -> Iterator[str]:
        return _split(chain.from_iterable(map(documents, files)), last)

    return Sources(lambda: part(last=False), lambda: part(last=False), lambda: part(last=True))


def sources_of_stories(count: int, told: Key, held_out: Key) -> Sources:
    """So many stories of one key for training, and others of another key."""
    def training() -> Iterator[str]:
        return (story.text for story in stories.stories(told, count))

    return Sources(lambda: islice(training(), 5000), training,
                   lambda: (story.text for story in stories.stories(held_out, VALIDATION_STORIES)))


def prepare(folder: Path, vocab_size: int | None, sources: Sources | None) -> Tokenizer:
    """Make of the FILES of a run those that are not there, each whole. Raises `FileNotFoundError` without sources."""
    if sources is None and (missing := [name for name in FILES if not place(folder, name).is_file()]):
        raise FileNotFoundError(f"{folder / missing[0]}: no such file; resume with the texts of the run: it is made "
                                "again from them")
    if not place(folder, TOKENIZER).is_file():
        learned = train_tokenizer(sources.tokenizer(), vocab_size)
        with replacing(folder / TOKENIZER) as beside:
            beside.write_bytes(learned.model)
    tokenizer = load_tokenizer(place(folder, TOKENIZER))
    for name, texts in (("train", sources and sources.train), ("valid", sources and sources.valid)):
        if not (folder / "data" / f"{name}.bin").is_file():
            encode_corpus(texts(), tokenizer, folder / "data" / f"{name}.bin")
    return tokenizer


def clear(folder: Path) -> None:
    """Leave nothing half-made: remove what a run that did not begin has written, and nothing else."""
    for name in (RECORD, *FILES):
        (folder / name).unlink(missing_ok=True)
    for part in (folder / "data", folder):
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()


def floor(folder: Path, tokenizer: Tokenizer, held_out: Key, context: int) -> float:
    """The lowest possible loss on the held-out stories: their entropy, in nats a token."""
    corpus = open_corpus(folder / "data" / "valid.bin", tokenizer, context)
    bits = sum(story.bits for story in stories.stories(held_out, VALIDATION_STORIES))
    return bits * math.log(2) / int(corpus.lengths.sum())


def _split(texts: Iterator[str], last: bool) -> Iterator[str]:
    few = list(islice(texts, 20))
    if len(few) == 20:
        yield from (text for i, text in enumerate(chain(few, texts)) if (i % 20 == 19) is last)
        return
    for text in few:
        cut = max(1, len(text) * 19 // 20)
        line = text.rfind("\n", cut * 9 // 10, cut) + 1  # a line's beginning, if there is one not far before
        yield text[line or cut:] if last else text[:line or cut]
