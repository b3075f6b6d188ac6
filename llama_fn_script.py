"""The program `llama-fn`, which imports the package only when it runs.

It stands outside the package, because the import of any module of the package first imports torch. That takes a second
or more, and Ctrl-C during an import would print a traceback.
"""

import os
import signal
from types import FrameType


def main() -> None:
    """Import the package and run the subcommand. Ctrl-C during the import ends the process with status 130."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # a process in the background of a shell ignores Ctrl-C, and still does
        signal.signal(signal.SIGINT, _end)
    from llama_fn.cli.main import main

    signal.signal(signal.SIGINT, handler)
    main()


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(130)  # nothing is open or half written yet, so nothing needs to be cleaned up
