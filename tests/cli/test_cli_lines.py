"""Messages of a pipe: a line each, or all between two fences, and none is lost, whatever the bytes."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli_chat import piped

from llama_fn.cli import lines


def messages(data: bytes | None) -> list[tuple[str, bool]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", None if data is None else piped(data))
        read, found = lines.reader(), []
        while True:
            try:
                found.append(lines.message(read))
            except EOFError:
                return found


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\n")).filter(lambda text: set(text.strip()) != {'"'})


@given(st.lists(texts, min_size=1), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_a_line_is_a_message(said, newline, mark, ended):
    said = [said[0].removeprefix("\ufeff") or "x", *said[1:], "end"]
    data = newline.join(said) + newline * ended
    assert messages(data.encode("utf-8-sig" if mark else "utf-8")) == [(text, True) for text in said]


@given(st.lists(texts), st.integers(3, 5), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_lines_between_fences_are_one_message_and_no_command(said, marks, newline, closed):
    fence = '"' * marks
    inside = [*said, '"' * (marks + 1)]  # another fence is a line
    data = newline.join(["before", fence, *inside, *([f" {fence} ", "/after"] if closed else [])])
    assert messages(data.encode()) == [("before", True), ("\n".join(inside), False), *[("/after", True)] * closed]


raw = st.binary().map(lambda data: bytes(x for x in data if x not in b'\r\n"'))


@given(st.lists(raw, min_size=1))
def test_any_bytes_come_through(said):
    found = [text.encode(errors="surrogateescape") for text, _ in messages(b"\n".join(said) + b"\n")]
    assert found == [said[0].removeprefix(b"\xef\xbb\xbf"), *said[1:]]


def test_long_lines_and_no_input(monkeypatch):
    assert messages(b"x" * 1_000_000 + b"\ny") == [("x" * 1_000_000, True), ("y", True)]
    assert messages(b"") == messages(None) == []
