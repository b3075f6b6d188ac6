"""Signals: the first one stops a run after its step and a snapshot, the second one at once; each has its own status."""

import os
import pty
import signal
import sys
import time

import pytest
from runs import SMALL, eager, result, signal_after, wait_for_snapshot, write_texts

from llama_fn.checkpoint.snapshot import save_snapshot
from llama_fn.training import saving
from llama_fn.training.run import run
from llama_fn.training.snapshots import snapshot_steps
from llama_fn.training.stopping import signals_noted, stop


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    eager(monkeypatch)


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", None)])
def test_a_signal_lets_the_step_finish_and_saves_it(tmp_path, capsys, name, status):
    texts, number = write_texts(tmp_path / "texts"), getattr(signal, name)
    whole = run(tmp_path / "whole", SMALL, texts, evaluate_every=4)
    assert whole is not None
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if status is None else SystemExit) as stopped:
        run(tmp_path / "run", SMALL, texts, evaluate_every=4, report=signal_after(3, number))
    assert getattr(stopped.value, "code", None) == status and signal.getsignal(number) is before
    assert "stops after this step" in capsys.readouterr().err
    assert snapshot_steps(tmp_path / "run") == [3]
    run(tmp_path / "run", SMALL, resume=True, evaluate_every=4)
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path / "run", SMALL, write_texts(tmp_path / "texts"), report=signal_after(3, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_signal_has_the_effect_that_it_had_before():
    noted_before = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted_before.append(number))
    try:
        with signals_noted() as noted:
            for count in range(3):
                signal.raise_signal(signal.SIGTERM)
                assert (noted, noted_before) == ([signal.SIGTERM], [signal.SIGTERM] * count)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_error_that_the_signal_caused_elsewhere_is_the_signals(number):
    """The terminal sends Ctrl-C to the C++ compiler, too, and its failure is a RuntimeError."""
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit), signals_noted():
        signal.raise_signal(number)
        raise RuntimeError("C++ compile error")
    with pytest.raises(RuntimeError), signals_noted():
        raise RuntimeError("C++ compile error")
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        stop(number)


@pytest.mark.parametrize("first, second", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGHUP", "SIGHUP")])
def test_the_second_signal_ends_the_process_at_once_and_the_old_snapshot_is_whole(tmp_path, first, second):
    texts = write_texts(tmp_path / "texts")
    if not (child := os.fork()):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, the process ends with it
        send = signal_after(3, getattr(signal, first), getattr(signal, second))

        def report(record: dict) -> None:
            if record["step"] == 3:
                wait_for_snapshot(tmp_path / "run", 2)
            send(record)

        run(tmp_path / "run", SMALL, texts, evaluate_every=2, report=report)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == getattr(signal, second)
    assert snapshot_steps(tmp_path / "run") == [2]
    seen = []
    run(tmp_path / "run", SMALL, resume=True, report=seen.append)
    assert seen[0]["step"] == 2


def test_a_terminal_that_is_closed_lets_the_step_finish_though_nothing_can_be_printed(tmp_path):
    texts = write_texts(tmp_path / "texts")
    child, terminal = pty.fork()
    if not child:
        def report(record: dict) -> None:
            os.write(2, f"step {record['step']}\n".encode())
            if record["step"] == 3:
                while signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:  # until the signal is noted
                    time.sleep(0.01)
                os.write(2, b"the terminal is gone\n")

        status = 0
        try:
            run(tmp_path / "run", SMALL, texts, report=report)
        except SystemExit as stopped:
            status = stopped.code
        finally:
            os._exit(status)
    seen = b""
    while b"step 3" not in seen:
        seen += os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert snapshot_steps(tmp_path / "run")[-1] == 3


def test_ctrl_c_while_the_last_snapshot_is_written_gives_it_up(tmp_path, monkeypatch):
    """The first Ctrl-C begins the write, the second one ends it: the run does not wait for a slow disk."""
    texts, steps = write_texts(tmp_path / "texts"), []

    def slow(state, folder, about, before_write, ranks):
        def interrupted():
            if about["step"] == 3:
                steps.append(about["step"])
                if len(steps) == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                saver_given_up.wait(20)
            before_write()

        save_snapshot(state, folder, about, interrupted, ranks)

    real = saving.Saver.__init__

    def remembered(self, *args):
        nonlocal saver_given_up
        real(self, *args)
        saver_given_up = self.given_up

    saver_given_up = None
    monkeypatch.setattr(saving.Saver, "__init__", remembered)
    monkeypatch.setattr(saving, "save_snapshot", slow)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", SMALL, texts, evaluate_every=2, report=signal_after(3))
    assert steps == [3] and snapshot_steps(tmp_path / "run") == [2]
    assert not list((tmp_path / "run" / "snapshots").glob(".*"))
