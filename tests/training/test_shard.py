"""A file of tokens: an independent reader reads the same, and whatever is cut, flipped or exchanged is named."""

import dataclasses
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_fn as lf
from llama_fn.training.early import convert_early, is_early
from llama_fn.training.encode import Encoded
from llama_fn.training.shard import open_shard, write_shard


@st.composite
def encoded(draw, vocab_size: int = 401) -> Encoded:
    tokens = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=12))
    learned = draw(st.none() | st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    return Encoded(np.array(tokens), None if learned is None else np.array(learned))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shard")


def read(data: bytes, model: bytes) -> list[tuple[list[int], list[bool]]]:
    """The documents, by the format's description alone."""
    magic, version, width, count, documents, flags = struct.unpack("<8sIIQQQ", data[:40])
    assert (magic, version) == (b"LLAMA_FN", 1) and flags in (0, count)
    assert data[40:72] == hashlib.sha256(model).digest() and data[72:104] == hashlib.sha256(data[256:]).digest()
    assert data[104:224] == bytes(120) and data[224:256] == hashlib.sha256(data[:224]).digest()
    tokens = struct.unpack_from(f"<{count}{'H' if width == 2 else 'I'}", data, 256)
    ends = struct.unpack_from(f"<{documents}Q", data, 256 + count * width)
    learned = data[256 + count * width + documents * 8:] if flags else b"\1" * count
    assert len(learned) == count
    return [(list(tokens[a:b]), list(map(bool, learned[a:b]))) for a, b in zip((0, *ends), ends, strict=False)]


@given(st.lists(encoded(), max_size=6))
def test_an_independent_reader_reads_what_was_written(folder, tokenizer, documents):
    assert write_shard(folder / "a.bin", tokenizer, iter(documents)) == sum(len(x.tokens) for x in documents)
    expected = [(x.tokens.tolist(), [True] * len(x.tokens) if x.learned is None else x.learned.tolist())
                for x in documents]
    assert read((folder / "a.bin").read_bytes(), tokenizer.model) == expected
    tokens, ends, learned = open_shard(folder / "a.bin", tokenizer)
    cut = [(tokens[a:b].tolist(), [True] * int(b - a) if learned is None else learned[a:b].astype(bool).tolist())
           for a, b in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
    assert cut == expected
    assert (learned is None) == all(x.learned is None for x in documents)


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path, tokenizer):
    large = dataclasses.replace(tokenizer, added=((2**16, "<last>"),))
    write_shard(tmp_path / "a.bin", large, [Encoded(np.array([1, 2**16, 2]), None)])
    tokens = open_shard(tmp_path / "a.bin", large).tokens
    assert tokens.tolist() == [1, 2**16, 2] and tokens.itemsize == 4


def test_learned_flags_beyond_memory_are_the_same(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("llama_fn.training.shard.SPOOLED", 16)
    documents = [Encoded(np.arange(50), None), Encoded(np.arange(50), np.arange(50) % 3 > 0)]
    write_shard(tmp_path / "a.bin", tokenizer, documents)
    assert open_shard(tmp_path / "a.bin", tokenizer).learned.tolist() == [1] * 50 + [int(i % 3 > 0) for i in range(50)]
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


# --- what is wrong is named

@pytest.fixture(scope="session")
def good(folder, tokenizer) -> bytes:
    documents = [Encoded(np.arange(30) + i, np.arange(30) > 9 if i % 2 else None) for i in range(9)]
    write_shard(folder / "good.bin", tokenizer, documents)
    return (folder / "good.bin").read_bytes()


def refused(file: Path, tokenizer: lf.Tokenizer, data: bytes, message: str) -> None:
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{file}: {message}"):
        open_shard(file, tokenizer)


@given(st.integers(0, 8 * 256 - 1), st.floats(0, 1, exclude_max=True))
def test_every_flipped_bit_is_found(folder, tokenizer, good, in_header, behind):
    for bit in (in_header, 8 * 256 + int(behind * 8 * (len(good) - 256))):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(folder / "flipped.bin", tokenizer, bytes(flipped), "(damaged: its|not a file of tokens)")


def test_every_length_but_its_own_is_found(folder, tokenizer, good):
    for part in range(1, 64):
        refused(folder / "cut.bin", tokenizer, good[:len(good) * part // 64], "(damaged|cut): [0-9,]+ bytes, ")
    refused(folder / "cut.bin", tokenizer, good + b"\0", "damaged: [0-9,]+ bytes, and its header says")
    refused(folder / "cut.bin", tokenizer, b"", "empty; remove it, and it is made again")
    refused(folder / "cut.bin", tokenizer, good[:255], "cut: 255 bytes, and the header alone has 256")


def test_another_file_version_and_tokenizer_are_found(folder, tokenizer, good, texts):
    refused(folder / "other.bin", tokenizer, np.arange(999, dtype=np.uint16).tobytes(), "not a file of tokens, or an ")
    refused(folder / "other.bin", lf.train_tokenizer(texts, 400), good, "encoded by another tokenizer")
    refused(folder / "other.bin", dataclasses.replace(tokenizer, added=((401, "<x>"),)), good, "encoded by another tok")
    later = good[:8] + struct.pack("<I", 2) + good[12:224]
    refused(folder / "other.bin", tokenizer, later + hashlib.sha256(later).digest() + good[256:],
            "a file of tokens of version 2; this program reads version 1")
    with pytest.raises(FileNotFoundError):
        open_shard(folder / "none.bin", tokenizer)


def test_without_the_digest_the_header_and_the_length_are_checked(folder, tokenizer, good):
    (folder / "a.bin").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert open_shard(folder / "a.bin", tokenizer, check=False).tokens.tolist()[:3] == [0, 1, 2]
    (folder / "a.bin").write_bytes(good[:-1])
    with pytest.raises(ValueError, match="damaged"):
        open_shard(folder / "a.bin", tokenizer, check=False)


def test_a_chat_template_changes_no_token(folder, tokenizer, good):
    (folder / "a.bin").write_bytes(good)
    assert len(open_shard(folder / "a.bin", dataclasses.replace(tokenizer, chat_template="x")).tokens) == 270


# --- files of earlier versions

@given(st.lists(st.lists(st.integers(2, 400), max_size=9), min_size=1, max_size=6))
def test_a_file_of_an_earlier_version_is_converted(folder, tokenizer, documents):
    flat = np.array([token for document in documents for token in (tokenizer.bos_id, *document)], "<u2")
    (folder / "early.bin").write_bytes(flat.tobytes())
    assert is_early(folder / "early.bin")
    assert convert_early(folder / "early.bin", tokenizer) == len(flat)
    assert read((folder / "early.bin").read_bytes(), tokenizer.model) == [
        ([tokenizer.bos_id, *document], [True] * (1 + len(document))) for document in documents]
    assert not is_early(folder / "early.bin")


@pytest.mark.parametrize("flat", [b"\1\0\5", np.array([5, 1, 6], "<u2").tobytes(), np.array([1, 401], "<u2").tobytes()])
def test_a_file_that_no_version_wrote_is_not_converted(folder, tokenizer, flat):
    (folder / "early.bin").write_bytes(flat)
    with pytest.raises(ValueError, match=r"early\.bin: not a file of tokens"):
        convert_early(folder / "early.bin", tokenizer)
    assert (folder / "early.bin").read_bytes() == flat
