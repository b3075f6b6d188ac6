"""The command line, in this process and in one of its own."""

import sys

from llama_fn.cli.main import main

COMMAND = [sys.executable, "-m", "llama_fn"]


def cli(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `llama-fn` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["llama-fn", *args])
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()
