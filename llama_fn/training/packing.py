"""How documents become rows for training, and in which order an epoch visits the rows.

A row predicts ``context`` tokens. A document that has more is cut into full rows and a rest:

    document         |------- context -------|------- context -------|-- rest --|
    an epoch's cuts  |-- shift --|------- context -------|------- context -------|- rest - shift -|

The rest, and every document of at most ``context`` predictions, is an *item*. Rows are filled with items, the longest
first, or get one item each. An item of a cut document may consist of the document's two ends, which are two segments.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 8  # of the Feistel network; four are enough for a cipher's wide blocks, but few rows make narrow ones
MASK = 2**32 - 1


class Rows(NamedTuple):
    """The rows: which items each has.

    Item i is number ``number[i]`` of the items of document ``document[i]``: its full rows in order, then its rest. The
    items of row r are those from ``first[r]`` up to ``first[r + 1]``, which is excluded.
    """

    document: np.ndarray
    number: np.ndarray
    first: np.ndarray


class Span(NamedTuple):
    """A stretch of the tokens: it starts at ``start`` and predicts the ``length`` tokens after that one."""

    start: int
    length: int


def rows_of(predictions: np.ndarray, context: int, pack: bool) -> Rows:
    """The rows of documents that have these numbers of predictions; one item a row unless ``pack``."""
    full, rest = np.divmod(predictions, context)
    items = full + (rest > 0)
    document = np.repeat(np.arange(len(predictions)), items)
    number = np.arange(len(document)) - np.repeat(np.cumsum(items) - items, items)
    if not pack:
        return Rows(document, number, np.arange(len(document) + 1))
    # The begin token of each segment takes one more slot. A rest that is cut in two has two segments.
    slots = np.where(number < full[document], context, rest[document]) + 1
    slots += (number == full[document]) & (number > 0) & (rest[document] > 1)
    order, sizes = filled(slots, context + 1)
    return Rows(document[order], number[order], np.concatenate([[0], np.cumsum(sizes)]))


def filled(slots: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Items of these sizes in rows of ``room``: the items row after row, and the number of items of each row.

    Each row repeatedly takes the longest remaining item that fits. Rows with items of the same lengths are made
    together, so that the time depends on the lengths and not on the number of items.
    """
    order = np.argsort(slots, kind="stable")
    lengths, begins = np.unique(slots[order], return_index=True)
    left = {int(length): items for length, items in zip(lengths, np.split(order, begins)[1:], strict=True)}
    parts, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    while left:
        row, space = {}, room
        for length in sorted(left, reverse=True):
            if count := min(space // length, len(left[length])):
                row[length], space = count, space - count * length
        times = min(len(left[length]) // count for length, count in row.items())
        made = [left[length][:times * count].reshape(times, count) for length, count in row.items()]
        parts.append(np.concatenate(made, 1).ravel())
        sizes.append(np.full(times, sum(row.values())))
        for length, count in row.items():
            left[length] = left[length][times * count:]
            if not len(left[length]):
                del left[length]
    return np.concatenate(parts), np.concatenate(sizes)


def spans(begin: int, predictions: int, number: int, context: int, shift: int) -> list[Span]:
    """The stretches of item ``number`` of the document that begins at ``begin``, in an epoch with this shift.

    ``shift`` lies in [0, 2**32), and ``shift / 2**32`` is the fraction of the rest that lies at the document's start.
    For every shift, the items of a document predict each of its tokens, except the first, exactly once.
    """
    full, rest = divmod(predictions, context)
    first = shift * (rest + 1) >> 32 if full else 0  # predictions of the rest that lie at the document's beginning
    if number < full:
        return [Span(begin + first + number * context, context)]
    ends = [Span(begin, first), Span(begin + first + full * context, rest - first)]
    return [span for span in ends if span.length]


def beginnings(predictions: np.ndarray, space: int, word: int) -> list[tuple[int, int]]:
    """Documents that fill ``space`` slots of a row, each with the number of its tokens to predict.

    The 32 bits of ``word`` seed the draw; every document is equally likely. The last one is cut where the row ends.
    """
    found = []
    while space > 1:
        word = mixed(word + 0x9E3779B9 & MASK)
        document = word * len(predictions) >> 32
        if length := min(int(predictions[document]), space - 1):
            found.append((document, length))
            space -= length + 1
    return found


def permuted(place: int, count: int, words: Sequence[int]) -> int:
    """The image of ``place`` under a random permutation of ``count`` numbers, whose keys are ``words`` of 32 bits.

    A Feistel network permutes the numbers of 2 n bits, and is applied until the result is below ``count`` (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"). So the permutation itself is never in memory.
    """
    half = max(3, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for word in words:
            left, right = right, left ^ (mixed(right ^ word) & low)
        place = left << half | right
        if place < count:
            return place


def mixed(x: int) -> int:
    """The finalizer of MurmurHash3: every bit of x changes about half of the bits of the result."""
    x = (x ^ x >> 16) * 0x85EBCA6B & MASK
    x = (x ^ x >> 13) * 0xC2B2AE35 & MASK
    return x ^ x >> 16
