"""Parts of a tensor: where each lies in the whole, what two of them have in common, and which process writes which."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama_fn.mesh.sharded import is_sharded
from llama_fn.mesh.sharding import Sharding


class Part(NamedTuple):
    """A box in a tensor: for each axis, the index at which it begins, and its length."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers there are in it."""
        return math.prod(self.shape)

    def within(self, outer: "Part") -> tuple[slice, ...]:
        """What selects this part of a tensor that holds the part `outer`."""
        return tuple(slice(start - zero, start - zero + length)
                     for start, zero, length in zip(self.start, outer.start, self.shape, strict=True))


def whole_part(shape: Sequence[int]) -> Part:
    """All of a tensor of this shape."""
    return Part((0,) * len(shape), tuple(shape))


def part_in(shape: Sequence[int], sharding: Sharding) -> Part:
    """The part that this process has of a tensor of this shape."""
    own = tuple(length if axis is None else length // axis.size
                for axis, length in zip(sharding.over, shape, strict=True))
    return Part(tuple(0 if axis is None else axis.index * length
                      for axis, length in zip(sharding.over, own, strict=True)), own)


def part_of(leaf: Any) -> Part:
    """The part of a leaf that this process has: its own of a sharded one, and all of a tensor."""
    return part_in(leaf.whole, leaf.sharding) if is_sharded(leaf) else whole_part(leaf.shape)


def common(a: Part, b: Part) -> Part:
    """What two parts of one tensor have in common. It has no numbers if they lie apart."""
    start = [max(pair) for pair in zip(a.start, b.start, strict=True)]
    end = [min(x + n, y + m) for x, n, y, m in zip(a.start, a.shape, b.start, b.shape, strict=True)]
    return Part(tuple(start), tuple(max(0, last - first) for first, last in zip(start, end, strict=True)))


def writers(tables: Sequence[Mapping[str, Part]], widths: Mapping[str, int]) -> dict[tuple[str, Part], int]:
    """Which process writes each part. ``tables`` has the part of each leaf, by its path, that each process has.

    Of several processes with the same part, that one writes it which has the fewest bytes to write so far. ``widths``
    are the bytes of one number of each leaf.
    """
    holders: dict[tuple[str, Part], list[int]] = {}
    for rank, table in enumerate(tables):
        for name, part in table.items():
            holders.setdefault((name, part), []).append(rank)
    bytes_so_far, found = [0] * len(tables), {}
    for (name, part), ranks in holders.items():
        found[name, part] = rank = min(ranks, key=lambda rank: bytes_so_far[rank])
        bytes_so_far[rank] += part.size * widths[name]
    return found
