"""`llama-fn chat` as a process: on a terminal with its keys, and in a pipe that breaks."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dialogs import save_talker
from program import COMMAND

# The program has a terminal of its own; what comes on standard input is typed there. Tests in the background are not to
# be interrupted, and it would inherit that.
ON_A_TERMINAL = """
import os, pty, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""
CTRL_A, CTRL_C, CTRL_D, CTRL_P = "\x01", "\x03", "\x04", "\x10"
PROMPT = "\x1b[?2004h> "  # a new one: readline asks for pastes in brackets first; a long line is drawn again without
THREE_LINES = "one\n/two\n\nthree"
PASTE = f"\x1b[200~{THREE_LINES}\x1b[201~"  # as a terminal sends it


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Models with contexts of 100 tokens and of more than is ever waited for."""
    root = tmp_path_factory.mktemp("models")
    return {context: save_talker(tokenizer, context, root / str(context)) for context in (100, 4000)}


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *args: str) -> None:
        pytest.importorskip("readline", reason="this Python has no line editing")
        self.last = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *COMMAND, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=0, env={**os.environ, "TERM": "dumb", "INPUTRC": os.devnull})

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()

    def read(self, *, until: str = "", at_least: int = 0) -> str:
        """What comes, up to a text and no further."""
        seen, begun = "", time.monotonic()
        while until not in seen or len(seen) < at_least:
            ready, _, _ = select.select([self.process.stdout], [], [], 5)
            new = os.read(self.process.stdout.fileno(), 1) if ready else b""
            seen += new.decode("latin-1")
            assert (new or not ready) and time.monotonic() - begun < 120, f"no {until!r} in {seen!r}"
            if not ready and self.last == CTRL_C:  # readline overhears one that comes just before it begins to listen
                self.type(CTRL_C)
        return seen

    def type(self, keys: str) -> None:
        self.last = keys
        self.process.stdin.write(keys.encode())

    def end(self) -> int:
        assert b"Traceback" not in self.process.stdout.read()
        return self.process.wait()


@pytest.mark.slow
def test_lines_are_edited_and_ctrl_c_stops_an_answer_and_not_the_program(folders):
    with Terminal("chat", str(folders[4000]), "--temperature", "0") as terminal:
        terminal.read(until="/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        terminal.read(until="> ")
        terminal.type(CTRL_C)
        assert "Traceback" not in terminal.read(until="Ctrl-D or /quit leaves")
        terminal.read(until="> ")
        terminal.type(f"help{CTRL_A}/\n")
        terminal.read(until="answer the last message again")
        terminal.read(until="> ")
        terminal.type("Who?\n")
        terminal.read(until="Who?")
        for keys, shown in ((f"{CTRL_P}\n", "Who?"), ("/again\n", "/again"), (CTRL_D, "")):
            assert "> " not in terminal.read(at_least=30)  # of the answer
            terminal.type(CTRL_C)
            terminal.read(until=" [stopped]")
            terminal.read(until="> ")
            terminal.type(keys)
            terminal.read(until=shown)
        assert terminal.end() == 0


def asked(file: Path) -> list[str]:
    """What the user said in a saved conversation."""
    return [message["content"] for message in json.loads(file.read_text()) if message["role"] == "user"]


@pytest.mark.slow
def test_a_paste_is_one_message_and_so_are_lines_between_fences(folders, tmp_path):
    with Terminal("chat", str(folders[4000]), "--max-new-tokens", "2", "--temperature", "0") as terminal:
        for keys in (f"{PASTE}\n", f'"""\n{THREE_LINES}\n"""\n', f'"""\nfour\n{CTRL_D}',
                     "\x1b[200~/help me\x1b[201~\n", f"/save {tmp_path / 'a.json'}\n"):
            terminal.read(until=PROMPT)
            terminal.type(keys)
        terminal.read(until="3 exchanges")
        terminal.read(until=PROMPT)  # before it, the end is not heard
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert asked(tmp_path / "a.json") == [THREE_LINES, THREE_LINES, "four"]


LONG = "the " * 1050 + "end"  # longer than a terminal keeps of a line by itself


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "messages"), [
    ([f"{PASTE}\nnext\n", CTRL_C], [THREE_LINES, "next"]), ([f"{LONG}\nnext\n"], [LONG, "next"])])
def test_what_is_typed_while_the_model_answers_is_kept_in_its_order(folders, tmp_path, typed, messages):
    with Terminal("chat", str(folders[4000]), "--max-new-tokens", "300", "--temperature", "0") as terminal:
        terminal.read(until="> ")
        terminal.type("Who?\n")
        terminal.read(until="Who?")
        assert "> " not in terminal.read(at_least=30)  # of the answer
        for keys in [*typed, f"/save {tmp_path / 'a.json'}\n{CTRL_D}"]:
            terminal.type(keys)
        terminal.read(until="3 exchanges")
        assert terminal.end() == 0
    assert asked(tmp_path / "a.json") == ["Who?", *messages]


@pytest.mark.slow
def test_nothing_is_asked_that_a_message_could_answer(folders, tmp_path):
    with Terminal("chat", str(folders[100]), "--max-new-tokens", "2", "--temperature", "0") as terminal:
        terminal.read(until="> ")
        digits = [digit * 20 for digit in "123"]  # a digit is a token
        terminal.type("\n".join([*digits, "2", "/drop 1", "/drop 1", f"/save {tmp_path / 'a.json'}", "/quit\n"]))
        terminal.read(until="the context of 100 tokens is full: the conversation has ")
        terminal.read(until="tokens are free again")
        assert terminal.end() == 0
    assert asked(tmp_path / "a.json")[-2:] == [digits[2], "2"]


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(folders):
    with subprocess.Popen([*COMMAND, "chat", str(folders[100])], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.write("Who?\nand?\n")
        process.stdin.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (0, "")
