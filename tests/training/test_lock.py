"""One process trains in a folder at a time, and a process that was killed does not keep others out."""

import errno
import os
import signal

import pytest
from runs import SMALL, eager, write_texts

from llama_fn.training import lock
from llama_fn.training.lock import locked
from llama_fn.training.run import run


def test_a_folder_is_locked_for_others_until_the_block_ends(tmp_path):
    folder = tmp_path / "a" / "run"
    for _ in range(2):
        with locked(folder):
            with pytest.raises(ValueError, match=rf"another process \({os.getpid()}\) trains in this folder"), \
                    locked(folder):
                pass
            assert (folder / "lock").is_file()  # the failed attempt did not remove it
        assert not (tmp_path / "a").exists()  # nothing is left of a run that wrote nothing
    with locked(folder):
        (folder / "mine").touch()
    assert os.listdir(folder) == ["mine"]


def test_a_killed_process_leaves_no_lock(tmp_path):
    ready, told = os.pipe()
    if not (child := os.fork()):
        with locked(tmp_path / "run"):
            os.write(told, b"!")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(ValueError, match=rf"another process \({child}\) trains"), locked(tmp_path / "run"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "run" / "lock").is_file()
    with locked(tmp_path / "run"):
        pass
    for end in (ready, told):
        os.close(end)


def test_a_lock_whose_file_was_just_removed_is_none(tmp_path, monkeypatch):
    """Between opening and locking the file, its owner may remove it; another process may make a new one."""
    real, calls = lock._lock, []

    def late(*args):
        if not calls:
            (tmp_path / "lock").unlink()
        calls.append(args)
        real(*args)

    monkeypatch.setattr(lock, "_lock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        monkeypatch.setattr(lock, "_lock", real)
        with pytest.raises(ValueError, match="another process"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path):
        pass


def test_two_trainings_in_one_folder_are_refused(tmp_path, monkeypatch):
    eager(monkeypatch)
    texts, seen = write_texts(tmp_path / "texts"), []

    def second(record: dict) -> None:
        seen.append(record)
        if len(seen) == 3:
            before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
            with pytest.raises(ValueError, match="another process .* trains in this folder"):
                run(tmp_path / "run", SMALL, texts, resume=True)
            assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    run(tmp_path / "run", SMALL, texts, report=second)
    assert [record["step"] for record in seen if "loss" in record] == [*range(1, 9)]
