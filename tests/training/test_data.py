import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chi_square import p_value
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import keys, unicode_texts

from llama_fn import AxesError, random
from llama_fn.training.data import Corpus, batch, encode_corpus, open_corpus, read_texts, rows

BOS = 1
SIXTEEN_BITS = SimpleNamespace(vocab_size=2**16, bos_id=BOS)  # all that a corpus needs of a tokenizer
documents = st.lists(st.integers(1, 40), min_size=1, max_size=8)  # lengths, without the begin
contexts = st.integers(1, 16)


def corpus(folder: Path, lengths: list[int], context: int) -> Corpus:
    """Documents of these lengths. Only the begin token repeats; every other token at position i is i + 2."""
    stream = np.arange(2, 2 + sum(lengths) + len(lengths), dtype=np.uint16)
    stream[np.cumsum([0] + [n + 1 for n in lengths[:-1]])] = BOS
    (folder / "corpus").write_bytes(stream.tobytes())
    return open_corpus(folder / "corpus", SIXTEEN_BITS, context)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


# --- texts

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


# --- corpus

@given(st.lists(unicode_texts()))
def test_a_corpus_is_the_texts_tokens_with_begin_and_end(folder, tokenizer, texts):
    count = encode_corpus(iter(texts), tokenizer, folder / "encoded")
    tokens = [token for text in texts for token in tokenizer.encode(text, bos=True, eos=True)]
    assert np.fromfile(folder / "encoded", np.uint16).tolist() == tokens and count == len(tokens)


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path):
    large = SimpleNamespace(vocab_size=2**16 + 1, bos_id=BOS, encode=lambda text, bos, eos: [BOS, 2**16, 2])
    encode_corpus(["a", "b"], large, tmp_path / "corpus")
    assert open_corpus(tmp_path / "corpus", large, 2).tokens.tolist() == [BOS, 2**16, 2] * 2


@pytest.mark.parametrize("before", [None, b"an older corpus"])
def test_a_corpus_is_whole_or_as_it_was_before(tmp_path, tokenizer, before):
    def texts():
        yield "a text"
        raise ValueError("line 2: not JSON")

    if before:
        (tmp_path / "corpus").write_bytes(before)
    with pytest.raises(ValueError, match="line 2"):
        encode_corpus(texts(), tokenizer, tmp_path / "corpus")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


@given(documents, contexts, st.integers(1, 9))
def test_the_rows_predict_every_token_of_every_document_once(folder, lengths, context, size):
    stream = corpus(folder, lengths, context)
    assert stream.lengths.min() > 0  # no row for nothing, either
    predicted = []
    for tokens, counts in rows(stream, size):
        assert tokens.shape == counts.shape == (size, context + 1)
        predicted += tokens[:, 1:][counts[:, 1:]].tolist()
    assert predicted == [token for token in stream.tokens.tolist() if token != BOS]


@given(documents, contexts, keys(), st.integers(0, 100))
def test_a_batch_is_a_function_of_key_and_step_alone(folder, lengths, context, key, step):
    stream = corpus(folder, lengths, context)
    tokens, counts = batch(stream, key, step, (2, 3))
    batch(stream, key, step + 1, (3, 2))
    again = batch(corpus(folder, lengths, context), key.clone(), step, (2, 3))
    assert tokens.shape == (2, 3, context + 1)
    assert torch.equal(tokens, again[0]) and torch.equal(counts, again[1])


def test_another_key_or_step_gives_another_batch(folder):
    stream = corpus(folder, [40] * 50, 8)
    drawn = [batch(stream, random.key(seed), step, (2, 8))[0] for seed in range(4) for step in range(4)]
    assert len({tuple(tokens.flatten().tolist()) for tokens in drawn}) == 16


@given(documents, contexts, keys())
def test_all_tokens_of_a_batch_count_but_the_begins(folder, lengths, context, key):
    tokens, counts = batch(corpus(folder, lengths, context), key, 0, (4, 8))
    assert torch.equal(counts, tokens != BOS)


@given(documents, contexts, keys())
def test_a_window_is_a_stretch_of_the_stream_that_begins_a_document_or_lies_in_a_long_one(
        folder, lengths, context, key):
    stream = corpus(folder, lengths, context)
    circle = stream.tokens.tolist() * 3 * (context + 1)
    begins = np.cumsum([0] + [n + 1 for n in lengths[:-1]]).tolist()
    for window in batch(stream, key, 0, (4, 8))[0].flatten(0, 1).tolist():
        start = _start(window, stream.tokens.tolist())
        assert window == [BOS, *circle[start + 1:start + context + 1]]  # as every prompt begins
        document = max(begin for begin in begins if begin <= start)
        assert start == document or lengths[begins.index(document)] > context


def _start(window: list[int], stream: list[int]) -> int:
    """The position of a row in a stream in which only the begin token repeats."""
    place, token = next((i, token) for i, token in enumerate(window) if token != BOS)
    return (stream.index(token) - place) % len(stream)


@given(st.integers(1, 30), contexts)
def test_a_long_document_is_cut_anywhere(folder, length, context):
    stream = corpus(folder, [length], context)
    tokens = batch(stream, random.key(0), 0, (20, 100))[0]
    starts = {_start(window, stream.tokens.tolist()) for window in tokens.flatten(0, 1).tolist()}
    # Every full window, and the last row, which is filled up from what follows.
    assert starts == {*range(max(0, length - context) + 1), (length - 1) // context * context}


@given(keys())
def test_rows_are_drawn_evenly(folder, key):
    lengths = [3, 7, 5, 1, 6]
    stream = corpus(folder, lengths, 8)
    tokens = batch(stream, key, 0, (16, 64))[0].flatten(0, 1)
    firsts = torch.bincount(tokens[:, 1], minlength=70)  # the token after the begin tells the document
    counts = firsts[firsts > 0]
    assert len(counts) == len(lengths) and p_value(counts, torch.full((5,), 0.2)) > 1e-6


@pytest.mark.parametrize("step", [-1, 2**32, 0.5])
def test_a_step_out_of_range_is_an_error(folder, step):
    with pytest.raises((ValueError, AxesError), match=f"{step}"):
        batch(corpus(folder, [5], 3), random.key(0), step, (1, 1))
