"""Stories from keys, and back: the tale's choices drawn at random, or found again in a text.

A tale made of choices among n1, n2, ... equally likely options carries log2 n1 + log2 n2 + ... bits, no more and no
less, since every text has one chain of choices. The mean over many stories is the grammar's entropy: the loss that a
perfect model of them would have, and a floor that no training run can go below.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from llama_fn import random
from llama_fn.random import Key
from llama_fn.ranges import integer
from llama_fn.shapes import typed
from llama_fn.stories.tale import Voice, tell

MOST_CHOICES = 64  # a tale makes at most 39


class Story(NamedTuple):
    """A text and its information content in bits: -log2 of the probability that the grammar tells it."""

    text: str
    bits: float


@typed
def story(key: Key) -> str:
    """The story of a key: the same key tells the same story, everywhere."""
    return _tell(random.bits(key, (MOST_CHOICES,)).tolist()).text


@typed
def stories(key: Key, count: int) -> Iterator[Story]:
    """`count` independent stories with their information content; the i-th is `story(fold_in(key, i))`.

    Raises `ValueError` for a count that is no integer from 0 on.
    """
    return _stories(key, integer("stories: count", count, 0))


def _stories(key: Key, count: int) -> Iterator[Story]:
    for start in range(0, count, 1024):
        numbers = torch.arange(start, min(start + 1024, count), device=key.device)
        words = torch.vmap(lambda n: random.bits(random.fold_in(key, n), (MOST_CHOICES,)))(numbers)
        yield from map(_tell, words.tolist())


def bits(text: str) -> float:
    """The information content of a text in bits; infinite where the grammar could not have told it."""
    return next(_readings(text), math.inf)


def derivable(text: str) -> bool:
    """Whether the grammar could have told exactly this text."""
    return bits(text) < math.inf


def _tell(words: Sequence[int]) -> Story:
    """Each choice takes the next 32-bit word: option floor(word * n / 2**32), even to within n / 2**32."""
    remaining, parts, content = iter(words), [], 0.0

    def choose(options: Sequence) -> object:
        nonlocal content
        content += math.log2(len(options))
        return options[next(remaining) * len(options) >> 32]

    tell(Voice(choose, parts.append))
    return Story("".join(parts), content)


class _Astray(Exception):
    """The choices made so far say something else than the text."""


def _readings(text: str) -> Iterator[float]:
    """The information content of every chain of choices that tells `text`: depth first, telling it again and again.

    `path` holds the option taken and the number of options at each choice; after a tale that goes astray, the last
    choice with options left takes its next one, and those after it start anew.
    """
    path: list[list[int]] = []
    while True:
        position, depth = 0, 0

        def choose(options: Sequence) -> object:
            nonlocal depth
            if depth == len(path):
                path.append([0, len(options)])
            depth += 1
            return options[path[depth - 1][0]]

        def say(part: str) -> None:
            nonlocal position
            if not text.startswith(part, position):
                raise _Astray
            position += len(part)

        try:
            tell(Voice(choose, say))
            if position == len(text):
                yield sum(math.log2(count) for _, count in path)
        except _Astray:
            pass
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1][0] += 1
