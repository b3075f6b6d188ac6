"""Signals that ask a run to stop: it finishes its step, saves, and ends with an exit status of its own."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C; what schedulers and `docker stop` send; a closed terminal


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """A context manager that yields a list, to which the first signal is appended.

    The second signal has the effect that it had before the block: it stops the process at once. A signal that was
    ignored before (as SIGHUP is under ``nohup``) stays ignored. Only the main thread gets signals; in another one the
    list stays empty. If the first signal also ended another program that this one waits for, such as the C++ compiler,
    then the `RuntimeError` of that becomes the exception of `stop`.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is note:  # and not what was set within the block
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python

    def note(number: int, frame: object) -> None:
        noted.append(number)
        restore()
        again = "press Ctrl-C again" if number == signal.SIGINT else "send it again"
        with suppress(RuntimeError, OSError):  # stderr may be in the middle of a write, or its terminal may be closed
            print(f"\nstops after this step; {again} to stop now", file=sys.stderr, flush=True)

    for name in SIGNALS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, note)
    try:
        yield noted
    except RuntimeError:
        if not noted:
            raise
        stop(noted[0])
    finally:
        restore()


@contextmanager
def terminal_may_close(noted: list[int]) -> Iterator[None]:
    """A context manager in which an `OSError` is no error after a signal: SIGHUP means that the terminal is closed."""
    try:
        yield
    except OSError:
        if not noted:
            raise


def stop(number: int) -> None:
    """Raise `KeyboardInterrupt` for SIGINT, and `SystemExit` with the status 128 + number for any other signal."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt from None
    raise SystemExit(128 + number) from None
