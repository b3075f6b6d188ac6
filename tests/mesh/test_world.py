"""What the processes of a mesh agree on, and what they say when one of them ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from worlds import world

import llama_fn as lf
from llama_fn import tree
from llama_fn.cli import on_mesh as command
from llama_fn.cli.on_mesh import on_mesh
from llama_fn.mesh.lost import Process, RankError, SilentExit, leave_word, lost
from llama_fn.mesh.ranks import Ranks
from llama_fn.mesh.world import ALONE, World, join
from llama_fn.training.stopping import signals_noted

CONFIG = lf.Config(dim=16, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=40, hidden_dim=24, max_seq_len=32)
BROKEN = RuntimeError("[/gloo/transport/tcp/pair.cc:1] Connection closed by peer")


def agreed() -> tuple:
    here, rows = join({"dp": 2}, "replicated"), torch.arange(24).reshape(2, 4, 3)
    rank = here.ranks.rank
    try:
        here.from_first(lambda: {}["x"] if rank else int("x"))
    except ValueError as error:
        failed = str(error)
    return here.from_first(lambda: f"rank {rank}"), here.largest(rank * 15), here.rows(rows, axis=1).tolist(), failed


def test_processes_share_what_the_first_found_the_largest_number_and_the_rows():
    rows = torch.arange(24).reshape(2, 4, 3)
    for rank, (first, largest, own, failed) in enumerate(world(2)(agreed)):
        assert (first, largest) == ("rank 0", 15) and "invalid literal" in failed
        assert own == rows[:, 2 * rank:2 * rank + 2].tolist()
    assert ALONE.rows(rows, axis=1) is rows and ALONE.largest(7) == 7 and ALONE.from_first(lambda: 3) == 3


def drawn_alike(mesh: dict, plan: str) -> bool:
    here, key = join(mesh, plan), lf.random.key(3)
    ours, whole = here.init_params(key, CONFIG), lf.init_params(key, CONFIG)
    same = tree.map(torch.equal, (ours, lf.mesh.unshard(ours)), (here.part(whole), whole))
    return all(tree.leaves(same))


@pytest.mark.parametrize(("mesh", "plan"), [({"dp": 2}, "fsdp"), ({"tp": 2}, "tensor"), ({"dp": 2}, "replicated")])
def test_the_parts_that_are_drawn_are_those_of_the_whole(mesh, plan):
    assert all(world(2)(drawn_alike, mesh, plan))


class Store(dict):
    def set(self, name: str, value: str) -> None:
        self[name] = value

    def check(self, names: list[str]) -> bool:
        return all(name in self for name in names)


@pytest.fixture
def processes(monkeypatch) -> Iterator[list[Process]]:
    """Four processes of this machine, of which the second one was killed."""
    monkeypatch.setattr("llama_fn.mesh.lost.OTHERS", 0.05)
    before = signal.getsignal(signal.SIGTERM)
    killed = subprocess.Popen(["true"])
    killed.wait()
    own = Process(socket.gethostname(), os.getpid())
    yield [own, own._replace(number=killed.pid), own, own]
    signal.signal(signal.SIGTERM, before)


def test_the_first_that_lives_names_the_one_that_was_killed_and_the_others_are_silent(processes):
    found = [lost(BROKEN, rank, processes, Store()) for rank in (0, 2, 3)]
    assert isinstance(found[0], RankError)
    assert f"rank 1 (process {processes[1].number}) was killed" in str(found[0])
    assert [x.code for x in found[1:]] == [1, 1]
    processes[0], processes[1] = processes[1], processes[0]
    assert "rank 0 (process" in str(lost(BROKEN, 1, processes, Store()))


def test_a_process_that_is_not_waited_for_yet_counts_as_killed(processes):
    with subprocess.Popen(["true"]) as ended:
        processes[1] = processes[1]._replace(number=ended.pid)
        assert "rank 1 (process" in str(lost(BROKEN, 0, processes, Store()))


def test_whoever_ended_with_words_of_its_own_needs_no_others(processes):
    store = Store()
    leave_word(store, 1)
    assert lost(BROKEN, 0, processes, store).code == 1


def test_a_process_that_is_silent_leaves_no_word_and_one_that_speaks_does(processes):
    """Otherwise the one that has to say it would be silent, too. torchrun cannot interrupt it, also after a run."""
    store = Store()
    for rank, error, words in (2, SystemExit, []), (0, RankError, ["ended/0"]), (3, SystemExit, ["ended/0"]):
        here = World(mesh=True, ranks=Ranks(rank, 4), processes=tuple(processes), store=store)
        with pytest.raises(error), here.watched(), signals_noted(), here.watched():
            raise BROKEN
        assert [*store] == words and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_an_error_of_all_is_said_by_the_first_and_one_of_a_single_process_by_itself(monkeypatch):
    monkeypatch.setattr("llama_fn.mesh.lost.FIRST", 0.05)
    store = Store()
    second = World(mesh=True, ranks=Ranks(1, 2), store=store)
    for error in (OSError("x"), KeyError("x"), RankError("x")):
        with pytest.raises(type(error)), second.watched():
            raise error
    assert [*store] == ["ended/1"]
    with pytest.raises(ZeroDivisionError), second._replace(ranks=Ranks(0, 2)).watched():
        raise ZeroDivisionError
    for error, outcome in (OSError("x"), SilentExit), (KeyboardInterrupt(), KeyboardInterrupt):
        with pytest.raises(outcome), second.watched():
            raise error


def test_a_process_of_another_machine_cannot_be_named(processes, monkeypatch):
    monkeypatch.setattr("llama_fn.mesh.lost.LOST", 0.05)
    processes[1] = Process("elsewhere", processes[1].number)
    assert str(lost(BROKEN, 2, processes, Store())) == f"rank 2 has lost another one: {BROKEN}"


@pytest.mark.parametrize(("mesh", "plan", "message"), [
    (None, None, "torchrun started 2 processes: say by --mesh how they share the work, such as dp=2"),
    (None, "fsdp", "--plan fsdp divides a model over a mesh: give --mesh, such as dp=2"),
    ("dp=3", None, "a mesh of dp=3 has 3 devices, and 2 processes run"),
    ("dp", None, "mesh 'dp': 'dp' should be an axis and its size"),
    ("dq=2", None, "no preset has a mesh of the axes dq"),
    ("dp=2", "zero", "plan 'zero' is not known; there are replicated, fsdp, tensor, fsdp+tensor"),
])
def test_a_wrong_mesh_is_refused_before_the_processes_join(monkeypatch, mesh, plan, message):
    for name, value in {"MASTER_ADDR": "x", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "join", None)
    with pytest.raises(ValueError, match="^" + message.replace("+", r"\+")[:60]), \
            on_mesh(mesh, plan, torch.device("cpu")):
        pass


def test_a_script_leaves_the_other_processes_when_it_ends():
    """What is registered first runs last."""
    script = ("import atexit, torch.distributed as dist; atexit.register(lambda: print(dist.is_initialized())); "
              "import llama_fn as lf; lf.mesh.make_mesh({'dp': 1}); print(dist.is_initialized())")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_without_torchrun_a_mesh_has_one_device():
    with pytest.raises(ValueError, match="a mesh of dp=2 has 2 devices, and 1 processes run"), \
            on_mesh("dp=2", None, torch.device("cpu")):
        pass
    with on_mesh(None, None, torch.device("cpu")) as here:
        assert here is ALONE


def test_others_than_the_first_wait_before_they_speak(monkeypatch):
    waits = []
    monkeypatch.setattr(command.time, "sleep", waits.append)
    assert command.speaker(ValueError("x")) == "" and waits == []
    for name, value in {"MASTER_ADDR": "x", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert command.speaker(RankError("x")) == "" and waits == []
    assert command.speaker(ValueError("x")) == "rank 1: " and waits == [command.LATER]
