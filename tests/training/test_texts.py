"""Files become documents: which files, which records, in which parts, and every error names its place."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import unicode_texts

from llama_fn.text import decode, text_parts
from llama_fn.training.texts import Dialog, Prompt, as_bytes, documents, plain, read_texts

QUESTION, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("texts")


@given(st.lists(unicode_texts(), max_size=5), st.booleans())
@example(["a\u2028b"], False)  # a line separator in Unicode, but not in JSON lines
def test_a_file_of_json_lines_holds_a_text_a_line(folder, texts, escaped):
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=escaped) for text in texts]
    (folder / "a.jsonl").write_text("\n\n".join([*lines, '{"text": "last"}']), encoding="utf-8")
    assert list(read_texts(folder / "a.jsonl")) == [text for text in texts if text.strip()] + ["last"]


@given(unicode_texts())
def test_a_text_file_is_one_text_unchanged_but_for_its_line_ends(folder, text):
    (folder / "a.txt").write_bytes(f".{text}".encode())
    assert list(read_texts(folder / "a.txt")) == [f".{text}".replace("\r\n", "\n").replace("\r", "\n")]


def test_a_folder_holds_the_texts_of_its_files_in_order(tmp_path):
    for name, content in {"b.txt": "second", "a.md": "first", "c/d.jsonl": '{"text": "third"}\n{"text": "fourth"}\n',
                          "image.png": "none", "empty.txt": " \n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.warns(UserWarning, match=r"not read: image\.png \(only \*\.txt, \*\.md, "):
        assert list(read_texts(tmp_path)) == ["first", "second", "third", "fourth"]
    assert list(read_texts(str(tmp_path / "image.png"))) == ["none"]  # a file that is named is read


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8: byte 0xE9 at offset 3; convert it"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xe9"}', r"a\.jsonl, line 3: not UTF-8: byte 0xE9 at offset 10"),
    ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: not JSON: "),
    ("a.jsonl", b'{"txt": "a"}', r'a\.jsonl, line 1: a record needs a string under "text"'),
    ("a.jsonl", b'{"text": 5}', r'a\.jsonl, line 1: a record needs a string under "text"'),
    ("a.jsonl", b'["text"]', r'a\.jsonl, line 1: a record needs a string under "text"'),
    ("a.jsonl", b'{"text": "a\\ud800"}', r'a\.jsonl, line 1: the "text" holds half a surrogate pair'),
    ("a.jsonl", b"\n", r"a\.jsonl: no text in it$"),
    ("a.txt", b" \n\t", r"a\.txt: no text in it$"),
])
def test_a_file_that_is_no_text_is_an_error_that_names_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / name))


def test_no_file_and_a_folder_without_texts_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt: no such file or folder"):
        list(read_texts(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: no text in it (looked for *.txt, *.md, *.json, ")):
        list(read_texts(tmp_path))


# --- kinds of records

def test_a_record_is_a_text_a_prompt_or_a_dialog(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    records = [{"text": "a text"}, {"prompt": "1 + 1 =", "completion": " 2", "id": 7},
               {"messages": [{**QUESTION, "name": "Ann"}, ANSWER]}, {"messages": [system, QUESTION, ANSWER, QUESTION]},
               {"text": " "}, {"prompt": "", "completion": "\n"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = list(documents(tmp_path / "a.jsonl"))
    assert found == ["a text", Prompt("1 + 1 =", " 2"), Dialog((QUESTION, ANSWER)),
                     Dialog((system, QUESTION, ANSWER, QUESTION))]
    assert list(map(plain, found)) == ["a text", "1 + 1 = 2", "Who?\nA fox.", "Be brief.\nWho?\nA fox.\nWho?"]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert list(documents(tmp_path / "a.json")) == found and list(read_texts(tmp_path)) == list(map(plain, found)) * 2


@pytest.mark.parametrize("record, message", [
    ({}, 'needs a string under "text", strings under "prompt" and "completion", or a dialog under "messages"$'),
    ({"prompt": "a"}, 'strings under "prompt" and "completion"'),
    ({"prompt": "a", "completion": 3}, 'strings under "prompt" and "completion"'),
    ({"text": "a", "messages": [QUESTION, ANSWER]}, "not more than one of these; it has text and messages"),
    ({"messages": "a"}, '"messages" is a list of objects with strings under "role" and "content"'),
    ({"messages": [{"role": "user"}]}, '"messages" is a list of objects with strings under "role" and "content"'),
    ({"messages": [QUESTION]}, "has an answer to learn, got user$"),
    ({"messages": []}, "has an answer to learn, got no message$"),
    ({"messages": [ANSWER, QUESTION]}, "goes .system,. user, assistant, .* got assistant, user$"),
    ({"messages": [QUESTION, {"role": "assistant", "content": "\ud800"}]}, "message 1 holds half a surrogate pair"),
    ({"prompt": "a", "completion": "\ud800"}, 'the "completion" holds half a surrogate pair'),
])
def test_a_record_of_another_kind_is_an_error_that_names_the_line(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps(record))
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{message}"):
        list(documents(tmp_path / "a.jsonl"))


def test_different_documents_have_different_bytes():
    every = ["a", "b", Prompt("a", "b"), Prompt("ab", ""), Dialog((QUESTION, ANSWER)), Dialog((ANSWER, QUESTION))]
    assert len({as_bytes(document) for document in every}) == len(every)


# --- a stream

@given(unicode_texts(max_size=60), st.integers(4, 20), st.booleans())
@example("a\r\nb\r\nc", 4, True)
@example("\r" * 9 + "\n" * 9, 4, False)
@example("a" * 50 + "\n", 4, False)
def test_the_parts_of_a_file_join_to_its_text_and_end_where_lines_end(folder, text, size, marked):
    data = b"\xef\xbb\xbf" * marked + b"." + text.encode()
    (folder / "b.txt").write_bytes(data)
    parts = list(text_parts(folder / "b.txt", size))
    assert "".join(parts) == decode(data, "")
    assert all(part.endswith("\n") for part in parts[:-1])
    longest = max(map(len, decode(data, "").split("\n")))
    assert all(len(part) <= 2 * size + longest for part in parts)


@given(unicode_texts(max_size=40), st.integers(4, 20), st.booleans(), st.sampled_from([b"\xff", b"\xe6\xbc"]))
def test_a_byte_that_is_not_utf_8_is_named_in_any_part_as_in_the_whole(folder, text, size, marked, wrong):
    data = b"\xef\xbb\xbf" * marked + b".." + text.encode() + wrong
    (folder / "c.txt").write_bytes(data)
    with pytest.raises(ValueError) as whole:
        decode(data, str(folder / "c.txt"))
    with pytest.raises(ValueError, match="^" + re.escape(str(whole.value)) + "$"):
        list(text_parts(folder / "c.txt", size))


@pytest.mark.parametrize("name, line", [("a.txt", "a line of text, as long as a line may be\n"),
                                        ("a.jsonl", '{"text": "a line of text, as long as a line may be"}\n')])
def test_a_file_larger_than_memory_is_read(tmp_path, monkeypatch, name, line):
    """Of 8 MB, less than a hundredth is in memory at a time, where parts have 16 kB."""
    monkeypatch.setattr("llama_fn.training.texts.text_parts", lambda file: text_parts(file, 1 << 14))
    (tmp_path / name).write_text(line * (8_000_000 // len(line)))
    tracemalloc.start()
    try:
        count = sum(len(plain(document)) for document in documents(tmp_path / name))
        assert tracemalloc.get_traced_memory()[1] < 400_000
    finally:
        tracemalloc.stop()
    assert count > 5_000_000
