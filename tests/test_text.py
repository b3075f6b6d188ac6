"""Text and JSON from bytes: a byte-order mark is no text, line ends are one, and only errors that name the place."""

import codecs
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from program import COMMAND, cli
from strategies import unicode_texts

import llama_fn as lf
from llama_fn.checkpoint.files import read_json
from llama_fn.text import decode, json_lines, parse, read_text
from llama_fn.training.data import encode_corpus
from llama_fn.training.manifest import digest_texts
from llama_fn.training.texts import read_texts

MARK = codecs.BOM_UTF8
OTHERS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE,
          "utf-32-be": codecs.BOM_UTF32_BE}
SUFFIXES = (".txt", ".TXT", ".md", ".Md", ".jsonl", ".JSONL", ".ndjson", ".json", ".Json", ".rst", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("text")


# --- the mark

@given(unicode_texts().filter(lambda text: not text.startswith("\ufeff")))
@example("a\ufeff")
def test_a_file_means_the_same_with_and_without_a_byte_order_mark(folder, text):
    text = f"{text}."
    files = {"a.txt": text, "a.jsonl": f"{json.dumps({'text': text})}\n" * 2, "a.json": json.dumps([{"text": text}])}
    for name, content in files.items():
        for mark in (b"", MARK):
            (folder / f"{len(mark)}{name}").write_bytes(mark + content.encode())
        plain, marked = (folder / f"{length}{name}" for length in (0, 3))
        assert list(read_texts(plain)) == list(read_texts(marked))
        assert [x.sha256 for x in digest_texts([plain], plain)] == [x.sha256 for x in digest_texts([marked], marked)]
    assert read_text(folder / "3a.txt") == text.replace("\r\n", "\n").replace("\r", "\n")


def test_only_a_mark_at_the_beginning_is_none_of_the_text(folder):
    assert decode(MARK + b"a" + MARK, "") == "a\ufeff" and decode(MARK + MARK + b"a", "") == "\ufeffa"
    (folder / "b.txt").write_bytes(MARK + b"\n")
    with pytest.raises(ValueError, match=r"b\.txt: no text in it"):
        list(read_texts(folder / "b.txt"))


def test_every_entry_point_reads_the_same_with_a_byte_order_mark(folder, monkeypatch, capsys, texts):
    """perplexity, the tokenizer, training's tokens, settings, and a prompt from a pipe."""
    content = "\n".join(texts[:30]).encode()
    told = {}
    for name, mark in (("plain.txt", b""), ("marked.txt", MARK)):
        (folder / name).write_bytes(mark + content)
        (folder / f"{name}.json").write_bytes(mark + b'{"dim": 3}')
        (folder / f"{name}.model").unlink(missing_ok=True)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + b"Once upon a time\r\n")))
        prompt = cli(monkeypatch, capsys, "generate", "-", "--seed", "1", "--max-new-tokens", "3")[1]
        perplexity = cli(monkeypatch, capsys, "perplexity", str(folder / name), "--window", "64")[:2]
        assert cli(monkeypatch, capsys, "tokenizer", str(folder / name), "--vocab-size", "330", "--out",
                   str(folder / f"{name}.model"))[0] == 0
        learned = lf.load_tokenizer(folder / f"{name}.model")
        encode_corpus(read_texts(folder / name), learned, folder / f"{name}.bin")
        told[name] = (prompt, perplexity, learned, np.fromfile(folder / f"{name}.bin", np.uint16).tolist(),
                      read_json(folder / f"{name}.json"))
    assert told["plain.txt"] == told["marked.txt"]
    assert told["plain.txt"][0].startswith("Once upon a time there")


@pytest.mark.slow
def test_a_pipe_to_chat_may_begin_with_a_byte_order_mark(model, tmp_path):
    lf.save(model, tmp_path / "model")
    for mark in (b"", MARK):
        done = subprocess.run([*COMMAND, "chat", str(tmp_path / "model")], input=mark + b"/hello\r\n",
                              capture_output=True, check=True)
        assert done.stdout == b"" and done.stderr == b"unknown command /hello; /help lists the commands\n"


@pytest.mark.slow
def test_a_pipe_to_chat_in_another_encoding_is_named_and_none_of_it_is_sent(model, tmp_path):
    lf.save(model, tmp_path / "model")
    for mark in (codecs.BOM_UTF16_LE, b""):
        done = subprocess.run([*COMMAND, "chat", str(tmp_path / "model")], capture_output=True, check=True,
                              input=mark + "Who was it?\nand then?\n".encode("utf-16-le"))
        assert done.stdout == b"" and done.stderr.startswith(b"standard input: not UTF-8 but UTF-16, by its ")
        assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", OTHERS)
def test_a_chat_template_in_another_encoding_is_named(model, tmp_path, encoding):
    lf.save(model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_bytes(OTHERS[encoding] + "{{ bos_token }}".encode(encoding))
    with pytest.raises(ValueError, match=f"chat_template.jinja: not UTF-8 but UTF-{encoding[4:6]}, by its byte-order"):
        lf.load(tmp_path / "model")


@pytest.mark.parametrize("encoding", OTHERS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_utf_16_and_32_are_named(tmp_path, encoding, suffix):
    (tmp_path / f"a{suffix}").write_bytes(OTHERS[encoding] + '{"text": "a"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=rf"a{suffix}.*: not UTF-8 but UTF-{encoding[4:6]}, by its byte-order mark; "):
        list(read_texts(tmp_path / f"a{suffix}"))


@pytest.mark.parametrize("encoding", OTHERS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_utf_16_and_32_without_a_mark_are_told_by_their_zeros(tmp_path, encoding, suffix):
    (tmp_path / f"a{suffix}").write_bytes('{"text": "a word"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=rf"a{suffix}.*: not UTF-8 but UTF-{encoding[4:6]}, by its zero bytes; "):
        list(read_texts(tmp_path / f"a{suffix}"))


def test_zeros_in_other_places_are_text():
    assert decode(b"a\0b\0", "") == "a\0b\0" and decode(b"\0" * 99, "") == "\0" * 99


def test_an_offset_counts_from_the_beginning_of_the_file(tmp_path):
    with pytest.raises(ValueError, match="^here: not UTF-8: byte 0xFF at offset 5; convert it to UTF-8 first$"):
        decode(MARK + b"ab\xff", "here")


@given(unicode_texts())
@example("a\rb\r\nc\n\rd")
def test_line_ends_are_those_of_pythons_text_mode(folder, text):
    (folder / "lines.txt").write_bytes(text.encode())
    with (folder / "lines.txt").open(encoding="utf-8") as file:
        assert read_text(folder / "lines.txt") == file.read()
    assert decode(text.replace("\r", "").replace("\n", "\r\n").encode(), "") == text.replace("\r", "")


# --- JSON

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                      lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(), some, max_size=3))


@given(st.lists(values, max_size=4))
@example([2**70 + 1, -(2**70) - 1])
def test_values_are_those_of_the_json_module(folder, some):
    (folder / "v.jsonl").write_text("\n".join(map(json.dumps, some)))
    assert [value for _, value in json_lines(folder / "v.jsonl")] == some
    assert json.dumps(parse(json.dumps(some), "")) == json.dumps(some)  # 1 is no 1.0
    assert parse(json.dumps(some, indent=1), "") == some


BAD = {"deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
       "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
       "digits": (b"1" * 5000, "a whole number of 5,000 digits; at most 4,300 are read"),
       "negative digits": (b"-" + b"1" * 5000, "a whole number of 5,000 digits"),
       "twice": (b'{"text": "a", "text": "b"}', "'text' is given twice in one object"),
       "cut": (b'{"text": "a"', r"Expecting ',' delimiter \(column 1"),
       "bytes": (b'"\xff"', "not UTF-8: byte 0xFF at offset")}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_that_cannot_be_read_is_an_error_with_its_place(tmp_path, name, suffix):
    bad, message = BAD[name]
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b'{"text": "a"}\n{"text": "b", "more": ' + bad + b"}\n")
    # A .json file with a second value is read as lines, if it is UTF-8 at all.
    place = ": " if suffix == ".json" and name == "bytes" else ", line 2: "
    with pytest.raises(ValueError, match=rf"^\S*/a\{suffix}{place}(not .*)?{message}"):
        list(read_texts(file))
    file.write_bytes(bad)
    with pytest.raises(ValueError, match=rf"^\S*/a\{suffix}"):
        read_json(file)


@pytest.mark.parametrize("content, texts", [
    ('[{"text": "a"}, {"text": "b", "n": NaN}]', ["a", "b"]), ('{"text":\n "a"}\n', ["a"]),
    ('{"text": "a"}\r\n\n{"text": "b"}', ["a", "b"]), ('[\n{"text": "a\\r\\n"}\n]', ["a\r\n"]),
])
def test_a_json_file_is_a_list_of_records_one_record_or_a_record_a_line(tmp_path, content, texts):
    (tmp_path / "a.json").write_text(content, newline="")
    assert list(read_texts(tmp_path / "a.json")) == texts


@pytest.mark.parametrize("content, message", [
    ('[{"text": "a"}, {"text": 5}]', r'a\.json, record 2: a record needs a string under "text"'),
    ('["a"]', r'a\.json, record 1: a record needs'), ("5", r"a\.json: a record needs"),
    ('[{"text": "\\ud800"}]', r"a\.json, record 1: .* half a surrogate pair"),
    ('[\n{"text": "a"},,]', r"a\.json: not JSON: Expecting value \(line 2, column 15\)"),
    ("[]", r"a\.json: no text in it"), ("", r"a\.json: not JSON"),
])
def test_a_json_file_without_records_is_an_error_with_its_place(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / "a.json"))


def test_a_metadata_file_is_utf_8_in_any_locale(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "é"}', encoding="utf-8")
    code = f"from llama_fn.checkpoint.files import read_json; print(ascii(read_json({str(tmp_path / 'a.json')!r})))"
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    assert done.stdout == r"{'a': '\xe9'}" + "\n"


# --- files

@given(st.sampled_from(SUFFIXES), st.binary(max_size=60) | st.lists(st.sampled_from(
    [b'{"text": "a"}', b"\n", b"[", b"]", b",", MARK, b"\xff\xfe", b'"\\ud800"', b"{", b"1" * 4301, b"[" * 10_000,
     b"NaN", b"\xc3", b'"text":', b"}"])).map(b"".join))
def test_no_bytes_do_more_than_raise_a_value_error(suffix, data):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / f"a{suffix}"
        file.write_bytes(data)
        for path in (file, folder):
            try:
                assert all(text.strip() and text.encode() for text in read_texts(path))
            except ValueError as error:
                assert str(path) in str(error)


def test_suffixes_count_in_capitals_too_and_what_is_not_read_is_named(tmp_path):
    for name, content in {"A.TXT": "first", "b.JSONL": '{"text": "second"}', "c.Json": '[{"text": "third"}]',
                          "d.csv": "x", "e/f.py": "x", "e/none": "x", "e/G.MD": "fourth"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "link").symlink_to(tmp_path / "e")
    with pytest.warns(UserWarning, match=r": not read: d\.csv, e/f\.py, e/none, link \(only \*\.txt, ") as warned:
        assert list(read_texts(tmp_path)) == ["first", "second", "third", "fourth"]
    assert len(warned) == 1
    for i in range(200):
        (tmp_path / f"e/{i}.png").touch()
    with pytest.warns(UserWarning, match=r": not read: d\.csv, e/0\.png, e/1\.png and 201 more \(only"):
        list(read_texts(tmp_path))


@pytest.mark.filterwarnings("default:.*not read")
def test_the_command_line_names_in_one_line_what_is_not_read(tmp_path, monkeypatch, capsys, texts):
    (tmp_path / "A.TXT").write_text(texts[0])
    (tmp_path / "b.csv").write_text(texts[1])
    status, _, err = cli(monkeypatch, capsys, "perplexity", str(tmp_path))
    named = [line for line in err.splitlines() if line.startswith("llama-fn: ")]
    assert status == 0 and len(named) == 1 and "not read: b.csv (only *.txt, " in named[0]
