"""Messages from a terminal or a pipe: a line, a pasted text, or all lines between two fences."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from llama_fn.text import other_encoding

BRACKETED_PASTE = "\x1b[?2004h"  # makes the terminal mark where a paste begins and ends


def on_terminal() -> bool:
    """Whether both standard input and standard output are a terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def reader() -> Callable[[str], str]:
    """A function that shows a prompt on a terminal and returns the next line, without its newline.

    After the last line it raises `EOFError`. On a terminal the line can be edited, and GNU readline returns a pasted
    text as one line with newlines in it. In a pipe, a byte that is not UTF-8 becomes a lone surrogate. The tokenizer
    refuses that message and no other. For a pipe in another encoding, by its byte-order mark, the function skips
    everything in it and raises `ValueError`.
    """
    if on_terminal():
        with suppress(ImportError):  # on Windows, the console edits lines itself
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off by default
        return input
    first = True

    def read(prompt: str) -> str:
        nonlocal first
        data = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        if sys.stdin is None or not data:
            raise EOFError
        if first and (other := other_encoding(data)):
            sys.stdin.buffer.read()
            raise ValueError(f"standard input: {other}")
        line = data.decode("utf-8-sig" if first else "utf-8", "surrogateescape")
        first = False
        return line.removesuffix("\n").removesuffix("\r")

    return read


def message(read: Callable[[str], str]) -> tuple[str, bool]:
    """The next message, and whether it is a single line. Only a single line can be a command.

    A line that consists of three or more quotation marks is a fence. All lines up to the same fence, or to the end of
    the input, are one message.
    """
    line = read("> ")
    fence = line.strip()
    if len(fence) < 3 or set(fence) != {'"'}:
        return line, "\n" not in line.rstrip("\n")
    lines = []
    with suppress(EOFError):
        while (line := read(". ")).strip() != fence:
            lines.append(line)
    return "\n".join(lines), False


@contextmanager
def typing_waits() -> Iterator[None]:
    """Do not show what is typed or pasted during the block; the next line that is read begins with it.

    Without this, the terminal cuts a line that no program reads yet after 4095 bytes, splits a paste into lines, and
    discards what was typed when Ctrl-C is pressed.
    """
    try:
        import termios
    except ImportError:  # on Windows
        yield
        return
    if not on_terminal():
        yield
        return
    terminal = sys.stdin.fileno()
    before, meanwhile = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    meanwhile[3] = meanwhile[3] & ~(termios.ICANON | termios.ECHO) | termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSANOW, meanwhile)
    if os.environ.get("TERM", "dumb") != "dumb":
        print(BRACKETED_PASTE, end="", flush=True)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
