"""A process of a mesh has ended, and the others wait for it: which one it was, and who says so.

`torchrun` ends all processes as soon as it sees that one has ended. Therefore those that have nothing to say wait until
the one that has is done.
"""

import os
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

LOST = 2.0  # seconds, at most, until the system knows that the process at the other end of a connection has ended
FIRST = 10.0  # seconds for the first process to come to an error of all processes
OTHERS = 20.0  # seconds for another process to say why the run ends; it may wait for the first one


class Process(NamedTuple):
    """A process: the name of its machine, and its number there."""

    machine: str
    number: int


class SilentExit(SystemExit):
    """The process ends, and has nothing to say."""


class RankError(ConnectionError):
    """An error that this process says, whichever it is."""


def is_of_collective(error: BaseException) -> bool:
    """Whether a collective failed, because another process ended or did not come in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave_word(store: Any, rank: int) -> None:
    """Let the others know that the process of this rank ends, and says itself why."""
    with suppress(RuntimeError):
        store.set(_word(rank), "")


def first_says(store: Any) -> bool:
    """Whether the first process ends now, too, and says why. It may come a little later."""
    until = time.monotonic() + FIRST
    while not (found := _any_left_word(store, [0])) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def lost(error: BaseException, rank: int, processes: Sequence[Process], store: Any) -> BaseException:
    """The error that the process of this rank raises after a collective failed.

    It is a `RankError` that names the dead processes, if this is the first of those that live. If another one
    says it, or if the one that ended says why, it is a `SilentExit` with the status 1, after a while.
    """
    with suppress(ValueError):  # this is not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `torchrun` has seen it, too, and must not interrupt the words
    until = time.monotonic() + LOST
    while True:
        if store is not None and _any_left_word(store, range(len(processes))):
            return _silent()
        if dead := [i for i, process in enumerate(processes) if not _lives(process)]:
            break
        if time.monotonic() > until:
            return RankError(f"rank {rank} has lost another one: {str(error).splitlines()[0]}")
        time.sleep(0.02)
    if any(i not in dead for i in range(rank)):
        return _silent()
    names = ", ".join(f"rank {i} (process {processes[i].number})" for i in dead)
    return RankError(f"{names} was killed or crashed, and the others stop; every snapshot on the disk is whole")


def _silent() -> SilentExit:
    time.sleep(OTHERS)
    return SilentExit(1)


def _word(rank: int) -> str:
    return f"ended/{rank}"


def _any_left_word(store: Any, ranks: Iterable[int]) -> bool:
    with suppress(RuntimeError):
        return any(store.check([_word(rank)]) for rank in ranks)
    return False


def _lives(process: Process) -> bool:
    """Whether a process runs, or is on another machine. One that was killed is in the system's table for a while."""
    if process.machine != socket.gethostname():
        return True
    try:
        os.kill(process.number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        return Path(f"/proc/{process.number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True
