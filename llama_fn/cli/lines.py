"""Messages from a terminal or a pipe, none of them lost: a line, a pasted text, or the lines between two fences."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from llama_fn.text import other_encoding

BRACKETED_PASTE = "\x1b[?2004h"  # asks the terminal to mark where a paste begins and ends


def on_terminal() -> bool:
    """Whether somebody types and reads here, and no pipe or file does."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def reader() -> Callable[[str], str]:
    """A function that shows a prompt on a terminal, and gives the next line without its end. At the end of all lines it
    raises `EOFError`.

    On a terminal a line is edited, and GNU readline gives a pasted text as one line with newlines in it. In a pipe, a
    byte that is not UTF-8 comes as a lone surrogate, which no tokenizer takes: it spoils its own message and no other.
    A pipe whose byte-order mark is another encoding's is a `ValueError`, and at its end.
    """
    if on_terminal():
        with suppress(ImportError):  # Windows has line editing of its own
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
        return input
    begun = False

    def read(prompt: str) -> str:
        nonlocal begun
        data = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        if not begun and (other := other_encoding(data)):
            sys.stdin.buffer.read()
            raise ValueError(f"standard input: {other}")
        line = data.decode("utf-8" if begun else "utf-8-sig", "surrogateescape")
        begun = True
        return line.removesuffix("\n").removesuffix("\r")

    return read


def message(read: Callable[[str], str]) -> tuple[str, bool]:
    """The next message, and whether it may be a command, as a single line may.

    A line of three or more quotation marks alone is a fence: all lines up to the same fence, or to the end of the
    input, are one message.
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
def held() -> Iterator[None]:
    """What is typed or pasted meanwhile on a terminal is not shown. It waits, in its order, for the next `reader` line.

    By itself a terminal cuts a line that nobody reads yet at 4095 bytes, tears a paste into lines, and throws away
    what waits when Ctrl-C is typed.
    """
    try:
        import termios
    except ImportError:  # on Windows
        termios = None
    if termios is None or not on_terminal():
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
