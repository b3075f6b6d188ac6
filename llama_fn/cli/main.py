"""`llama-fn`: choose a subcommand, run it, and print its errors."""

import contextlib
import functools
import inspect
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from llama_fn import __version__
from llama_fn.cli.bench import bench
from llama_fn.cli.chat import chat
from llama_fn.cli.convert import convert
from llama_fn.cli.errors import description, is_for_the_user, one_line
from llama_fn.cli.evaluate import evaluate
from llama_fn.cli.finetune import finetune
from llama_fn.cli.generate import generate
from llama_fn.cli.inspect import inspect as inspect_model
from llama_fn.cli.on_mesh import speaker
from llama_fn.cli.perplexity import choose, perplexity
from llama_fn.cli.plan import plan
from llama_fn.cli.report import report
from llama_fn.cli.tokenizer import tokenizer
from llama_fn.cli.train import train

COMMANDS = {"generate": generate, "chat": chat, "perplexity": perplexity, "choose": choose, "inspect": inspect_model,
            "convert": convert, "train": train, "finetune": finetune, "report": report, "tokenizer": tokenizer,
            "evaluate": evaluate, "bench": bench, "plan": plan}


def main() -> None:
    """Run one subcommand, or print the version.

    For bad input, one line goes to standard error and the exit status is 2. After Ctrl-C it is 130.
    """
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # PowerShell's pipes begin with a byte-order mark
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"llama-fn: {message}", file=sys.stderr)
            if sys.argv[1:] in (["--version"], ["-V"]):
                print(f"llama-fn {__version__}")
            else:
                _parsed(sys.argv[1:])()
        sys.stdout.flush()
    except BrokenPipeError:  # the program that reads our output has ended
        _give_up_output()
    except Exception as error:
        if not is_for_the_user(error):
            raise
        name = speaker(error)
        try:
            sys.stdout.flush()
        except OSError:
            _give_up_output()
        print(f"llama-fn: {name}{description(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parsed(args: Sequence[str]) -> Callable[[], None]:
    """The subcommand with its arguments bound, to be called later.

    Raises `ValueError` for wrong arguments. By itself tyro prints a box of several lines and exits.
    """

    def bind_only(command: Callable) -> Callable:
        @functools.wraps(command)  # tyro reads the command's signature
        def bound(*args: Any, **named: Any) -> Callable[[], None]:
            return functools.partial(command, *args, **named)

        # tyro wraps the lines of an argument's text, but keeps a line end before an indent: put each text in one line.
        bound.__doc__ = re.sub(r"\n {12}", " ", command.__doc__ or "")
        vars(bound)["__signature__"] = inspect.signature(command)
        del vars(bound)["__wrapped__"]  # whose docstring tyro would read
        return bound

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.extras.subcommand_cli_from_dict(
                {name: bind_only(command) for name, command in COMMANDS.items()}, prog="llama-fn", args=args,
                description="LLaMA 2 as pure functions. (--version prints the version.)",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    except SystemExit as stop:
        if stop.code != 2:
            raise
    _, *lines = (line.strip(" │|") for line in box.getvalue().splitlines() if line.strip())  # the first is a title
    text = " ".join(line if line.strip("─-╰╯+") else "\n" for line in lines)  # only a rule ends a message
    raise ValueError(one_line(text.splitlines()))


def _give_up_output() -> None:
    """Discard what is still to be written. Otherwise Python tries to write it at its end and prints an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
