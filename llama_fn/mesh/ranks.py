"""Processes that work together on files: each does its part, and all of them succeed or all of them fail."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from llama_fn import tree
from llama_fn.mesh.sharded import is_sharded

T = TypeVar("T")


class Ranks(NamedTuple):
    """The processes that work together, as one of them sees it: its number, how many there are, and their group.

    The group None is that of all processes. Threads of one process need groups of their own: collectives of one group
    must run in the same order everywhere.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


ALONE = Ranks()


def all_ranks(apart: bool = False) -> Ranks:
    """All processes that `torchrun` started; this process alone, if it was started otherwise.

    ``apart`` makes a group of its own, for the collectives of another thread. All processes must then call this.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo") if apart else None)


def ranks_of(value: Any) -> Ranks:
    """The processes that have the parts of a tree: all of them if a leaf is sharded, else this one alone."""
    return all_ranks() if any(map(is_sharded, tree.leaves(value, is_sharded))) else ALONE


def agreed(compute: Callable[[], T], ranks: Ranks) -> list[T]:
    """Run `compute` on every process and return the results of all, in the order of the ranks.

    If it raises `OSError` or `ValueError` on one of them, every process raises that error; the lowest rank's, if there
    are several. All of them must call this. Any other error ends its process, and `torchrun` then ends the others.
    """
    own: tuple[T | None, Exception | None]
    try:
        own = compute(), None
    except (OSError, ValueError) as error:
        if ranks.size == 1:
            raise
        own = None, error
    results: list[Any] = [own]
    if ranks.size > 1:
        results = [None] * ranks.size
        dist.all_gather_object(results, own, ranks.group)
    for _, error in results:
        if error is not None:
            raise error
    return [result for result, _ in results]
