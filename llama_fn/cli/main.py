"""`llama-fn`: the subcommands, and what becomes of their errors."""

import errno
import io
import os
import sys
import warnings

import tyro

from llama_fn import __version__
from llama_fn.bench.bench import bench
from llama_fn.cli.chat import chat
from llama_fn.cli.convert import convert
from llama_fn.cli.evaluate import evaluate
from llama_fn.cli.generate import generate
from llama_fn.cli.inspect import inspect
from llama_fn.cli.perplexity import choose, perplexity
from llama_fn.cli.tokenizer import tokenizer
from llama_fn.cli.train import train

COMMANDS = {"generate": generate, "chat": chat, "perplexity": perplexity, "choose": choose, "inspect": inspect,
            "convert": convert, "train": train, "tokenizer": tokenizer, "evaluate": evaluate, "bench": bench}


def main() -> None:
    """Run one subcommand, or tell the version. Bad input is one line on standard error and status 2; Ctrl-C is 130."""
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # PowerShell's pipes begin with a byte-order mark
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"llama-fn: {message}", file=sys.stderr)
            if sys.argv[1:] in (["--version"], ["-V"]):
                print(f"llama-fn {__version__}")
            else:
                tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="llama-fn",
                                                     description="LLaMA 2 as pure functions (--version tells which).",
                                                     config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has gone; nothing more is to be said
        _give_up_output()
    except (ValueError, OSError) as error:
        try:
            sys.stdout.flush()
        except OSError:
            _give_up_output()
        print("llama-fn: " + "; ".join(line.strip() for line in _told(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _told(error: Exception) -> str:
    """What is wrong with which file. Writers of files name them: what could not be written without a name is output."""
    if not getattr(error, "strerror", None):
        return str(error)
    place = error.filename
    if place is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        place = "standard output"
    return error.strerror if place is None else f"{place}: {error.strerror}"


def _give_up_output() -> None:
    """Standard output takes no more; or Python tries again when it ends, and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
