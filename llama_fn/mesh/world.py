"""A world: the processes that `torchrun` started, which run one program together, and what each of them does in it.

All processes call the same functions in the same order. What all of them need to know, the first one finds, and the
others wait for it (`World.from_first`).
"""

import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from llama_fn import tree
from llama_fn.config import Config
from llama_fn.mesh.connect import connect
from llama_fn.mesh.init import init_parts
from llama_fn.mesh.lost import Process, RankError, SilentExit, first_says, is_of_collective, leave_word, lost
from llama_fn.mesh.plan import Plan, check_plan, plan_of, rows_over
from llama_fn.mesh.ranks import ALONE as NO_OTHERS
from llama_fn.mesh.ranks import Ranks, agreed, all_ranks
from llama_fn.mesh.shard import make_mesh, rows_of, shard, sizes_of
from llama_fn.model.init import init_params
from llama_fn.model.transformer import Params
from llama_fn.random import Key

T = TypeVar("T")


class World(NamedTuple):
    """The processes of a mesh, as one of them sees them. Without a mesh, there is this process alone."""

    mesh: DeviceMesh | None = None
    plan: str | Plan = "replicated"
    ranks: Ranks = NO_OTHERS  # their group waits as long as it takes
    processes: tuple[Process, ...] = ()
    store: Any = None  # where processes leave words for each other
    job: str | None = None  # the call of `torchrun` that started them
    restarts: int = 0  # how often it has started them again

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and speaks to the user."""
        return self.ranks.rank == 0

    @property
    def row_parts(self) -> int:
        """Into how many parts the rows of a batch are divided."""
        if self.mesh is None:
            return 1
        sizes = sizes_of(self.mesh)
        return math.prod(sizes[name] for name in rows_over(plan_of(self.plan)))

    def check(self, config: Config) -> None:
        """Raise `ValueError` unless the plan can divide such a model over the mesh."""
        if self.mesh is not None:
            check_plan(config, sizes_of(self.mesh), self.plan, self.ranks.size)

    def check_rows(self, rows: int) -> None:
        """Raise `ValueError` unless a batch of so many rows can be divided over the mesh."""
        if rows % self.row_parts:
            raise ValueError(f"a batch of {rows} rows cannot be divided over {self.row_parts} devices; choose a "
                             f"multiple of {self.row_parts}")

    def init_params(self, key: Key, config: Config, device: torch.device | str | None = None) -> Params:
        """Random parameters, of which this process has its part; the whole is the same on every mesh."""
        if self.mesh is None:
            return init_params(key, config, device=device)
        return init_parts(key, config, self.mesh, self.plan, device=device)

    def part(self, whole: T) -> T:
        """The part that this process has of a tree, which is the same on all of them (`shard`)."""
        return whole if self.mesh is None else shard(whole, self.mesh, self.plan)

    def rows(self, batch: T, axis: int = 0) -> T:
        """The rows of this process, from the tensors of a batch that have those of all processes along an axis."""
        if self.mesh is None:
            return batch
        mesh = self.mesh
        return tree.map(lambda x: rows_of(x.movedim(axis, 0), mesh, self.plan).movedim(0, axis).contiguous(), batch)

    def from_first(self, f: Callable[[], T]) -> T:
        """The result of `f()` in the first process, on all of them, which wait for it.

        If it raises a `ValueError` or an `OSError` there, all of them raise it.
        """
        return agreed(lambda: f() if self.is_first else None, self.ranks)[0]  # pyright: ignore[reportReturnType]

    def apart(self) -> Ranks:
        """The processes, with a group of its own for another thread. All processes must call this."""
        return self.ranks if self.mesh is None else all_ranks(apart=True)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.mesh is None:
            return number
        x = torch.tensor(number)
        dist.all_reduce(x, dist.ReduceOp.MAX, self.ranks.group)
        return int(x)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context manager of which one process says what is wrong, and the others end in silence.

        An error of a collective becomes a `RankError` that names the process which has ended (see `lost`). An error of
        all processes is said by the first one.
        """
        try:
            yield
        except SilentExit:
            raise
        except BaseException as error:
            if self.mesh is not None and is_of_collective(error):
                raise lost(error, self.ranks.rank, self.processes, self.store) from error
            if self.store is None:
                raise
            leave_word(self.store, self.ranks.rank)
            of_all = isinstance(error, Exception) and not isinstance(error, RankError)
            if of_all and not self.is_first and first_says(self.store):
                raise SilentExit(2) from error
            raise


ALONE = World()


def join(sizes: Mapping[str, int], plan: str | Plan, device: str = "cpu") -> World:
    """Join the other processes in a mesh of these sizes.

    Raises `ValueError` unless there are as many as the mesh has devices.
    """
    store = None if dist.is_initialized() else connect(device)
    mesh = make_mesh(sizes, device)
    ranks = all_ranks()
    processes: list[Any] = [None] * ranks.size
    dist.all_gather_object(processes, Process(socket.gethostname(), os.getpid()), ranks.group)
    return World(mesh, plan, ranks, tuple(processes), store, _job(),
                 int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def _job() -> str | None:
    """What tells one call of `torchrun` from another: the name that it was given, or its process's number."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()}" if name == "none" else name
