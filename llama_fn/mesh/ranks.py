"""Processes that work together on files: each does its part, and all of them succeed or all of them fail."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from llama_fn import tree
from llama_fn.mesh.sharded import is_sharded

T = TypeVar("T")

PATIENCE = timedelta(days=30)  # while the first process prepares the texts of a run, or writes its last files
APART = timedelta(hours=1)  # for the slowest process to write its part of a snapshot; a machine may have vanished


class Ranks(NamedTuple):
    """The processes that work together, as one of them sees it: its number, how many there are, and their group.

    Threads of one process need groups of their own: collectives of one group must run in the same order everywhere.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


ALONE = Ranks()


def all_ranks(apart: bool = False) -> Ranks:
    """All processes that `torchrun` started; this process alone, if it was started otherwise.

    All of them must call this. ``apart`` makes a group of its own, for the collectives of another thread.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    group = dist.new_group(backend="gloo", timeout=APART) if apart else _patient_group(dist.group.WORLD)
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


@functools.lru_cache(1)
def _patient_group(world: Any) -> Any:
    """The group of all processes that waits as long as it takes."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


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


def check_same(what: str, value: Any, params: Any) -> None:
    """Raise `ValueError` on every process unless all that have parts of the parameters were given the same value.

    Otherwise each would compute with its part of a weight and its own value, or wait for the others for ever.
    """
    if is_sharded(params.norm):
        ranks = all_ranks()
        values = agreed(lambda: value, ranks)
        if other := [rank for rank, one in enumerate(values) if one != values[0]]:
            raise ValueError(f"{what}: rank {other[0]} was given another one than rank 0; give all processes of a mesh "
                             "the same")
