"""Stories from random keys, and the way back: the choices of a story are drawn at random, or found again in its text.

Every story is made by a chain of choices, each among equally likely options, and no two chains make the same text. So a
story with choices among n1, n2, ... options has log2 n1 + log2 n2 + ... bits of information. The mean over many stories
is the entropy of the grammar, which is the loss of a perfect model of it: no training run can go below.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from llama_fn import random
from llama_fn.random import Key
from llama_fn.ranges import integer
from llama_fn.shapes import typed
from llama_fn.stories.tale import Voice, tell

MOST_CHOICES = 64  # a story needs at most 39


class Story(NamedTuple):
    """A text and its information content in bits, -log2 of the probability that the grammar makes it.

    >>> story: lf.stories.Story = next(lf.stories.stories(key, 1))
    """

    text: str
    bits: float


@typed
def story(key: Key) -> str:
    """The story of a key; the same key makes the same story on every device.

    >>> text = lf.stories.story(lf.random.key(0))
    """
    return _tell(random.bits(key, (MOST_CHOICES,)).tolist()).text


@typed
def stories(key: Key, count: int) -> Iterator[Story]:
    """Independent stories with their information content; number i is ``story(fold_in(key, i))``.

    Raises `ValueError` for a ``count`` that is not an integer of at least 0.

    >>> texts = [text for text, bits in lf.stories.stories(key, 10)]
    """
    return _stories(key, integer("stories: count", count, 0))


def _stories(key: Key, count: int) -> Iterator[Story]:
    for start in range(0, count, 1024):
        numbers = torch.arange(start, min(start + 1024, count), device=key.device)
        words = torch.vmap(lambda n: random.bits(random.fold_in(key, n), (MOST_CHOICES,)))(numbers)
        yield from map(_tell, words.tolist())


def bits(text: str) -> float:
    """The information content of a text in bits, or infinity for a text that the grammar does not make.

    >>> information = lf.stories.bits(lf.stories.story(key))
    """
    return next(_readings(text), math.inf)


def derivable(text: str) -> bool:
    """Whether the grammar makes exactly this text.

    >>> assert lf.stories.derivable(lf.stories.story(key))
    """
    return bits(text) < math.inf


def _tell(words: Sequence[int]) -> Story:
    """The story of a list of 32-bit words.

    Each choice uses the next word w: of n options it takes number floor(w n / 2**32). The probabilities of the options
    are equal to within n / 2**32.
    """
    remaining, parts, content = iter(words), [], 0.0

    def choose(options: Sequence) -> Any:
        nonlocal content
        content += math.log2(len(options))
        return options[next(remaining) * len(options) >> 32]

    tell(Voice(choose, parts.append))
    return Story("".join(parts), content)


class _Mismatch(Exception):
    """The choices made so far make another text."""


def _readings(text: str) -> Iterator[float]:
    """The information content of every chain of choices that makes `text`, found by a depth-first search.

    `path` holds, for each choice, the option taken and the number of options. Where the story differs from the text,
    the last choice with an option left takes its next option, the choices after it are dropped, and the story is told
    again.
    """
    path: list[list[int]] = []
    while True:
        position, depth = 0, 0

        def choose(options: Sequence) -> Any:
            nonlocal depth
            if depth == len(path):
                path.append([0, len(options)])
            depth += 1
            return options[path[depth - 1][0]]

        def say(part: str) -> None:
            nonlocal position
            if not text.startswith(part, position):
                raise _Mismatch
            position += len(part)

        try:
            tell(Voice(choose, say))
            if position == len(text):
                yield sum(math.log2(count) for _, count in path)
        except _Mismatch:
            pass
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1][0] += 1
