"""Reads the settings and pieces of a SentencePiece model file, and writes a new one (``sentencepiece_model.proto``).

The file is a protocol buffer: a message of numbered fields. Three kinds of field are used here. Kind 0 is an integer in
groups of 7 bits, kind 5 is four bytes, and kind 2 is a count and that many bytes, which may be a message again.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # numbers of the model's fields
BPE = 2  # the number of BPE among the trainer's model types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of a piece


class Piece(NamedTuple):
    """A token's text (U+2581 stands for a space), its score (the highest is merged first), and its type."""

    text: str
    score: float
    type: int = NORMAL


class Settings(NamedTuple):
    """How a model treats a text. The defaults are those of the file format."""

    bpe: bool = False
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    normalized: bool = False
    remove_extra_whitespaces: bool = True
    user_defined_symbols: bool = False
    dummy_prefix: bool = True

    def unusual(self) -> list[str]:
        """The settings that differ from those of LLaMA's tokenizers; the dummy prefix may be either."""
        usual = Settings(bpe=True, byte_fallback=True, remove_extra_whitespaces=False, dummy_prefix=self.dummy_prefix)
        each = zip(self._fields, self, usual, strict=True)
        return [f"{name}={value}" for name, value, expected in each if value != expected]


def pieces_of(model: bytes) -> list[Piece]:
    """The pieces of a model, in the order of their ids. The model must be one that SentencePiece has read."""
    messages = (dict(_fields(value)) for number, value in _fields(model) if number == PIECES)
    return [Piece(piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL))
            for piece in messages]


def settings_of(model: bytes) -> Settings:
    """The settings of a model. The model must be one that SentencePiece has read."""
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(model):
        if number in (TRAINER, NORMALIZER):
            (trainer if number == TRAINER else normalizer).update(_fields(value))
    return Settings(trainer.get(3, 1) == BPE, bool(trainer.get(35, 0)), bool(trainer.get(24, 0)),
                    bool(normalizer.get(2, b"")), bool(normalizer.get(4, 1)),
                    any(piece.type == USER_DEFINED for piece in pieces_of(model)), bool(normalizer.get(3, 1)))


def bpe_model(pieces: Iterable[Piece], dummy_prefix: bool, ids: dict[str, int]) -> bytes:
    """The file of a BPE model with byte fallback and without normalization, as LLaMA's are.

    `ids` are the ids of "unk", "bos", "eos" and "pad"; -1 stands for a token that the model does not have.
    """
    pieces = list(pieces)
    trainer: list[tuple[int, int | bytes]] = [(3, BPE), (4, len(pieces)), (35, 1)]
    for field, name in enumerate(("unk", "bos", "eos", "pad"), 40):
        trainer.append((field, ids[name]))
        if ids[name] >= 0:
            trainer.append((field + 5, pieces[ids[name]].text.encode()))
    messages = [(PIECES, _message([(1, text.encode()), (2, score), (3, type)])) for text, score, type in pieces]
    return _message([*messages, (TRAINER, _message(trainer)),
                     (NORMALIZER, _message([(1, b"identity"), (3, int(dummy_prefix)), (4, 0), (5, 1)]))])


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The number and the value of each field of a message; the value is an integer or bytes, as its kind says."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _number(data, at)
        else:
            size, at = _number(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at:at + size], at + size
        yield tag >> 3, value


def _number(data: bytes, at: int) -> tuple[int, int]:
    """The integer that begins at an offset, and the offset after it."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _message(fields: Iterable[tuple[int, int | float | bytes]]) -> bytes:
    """The bytes of a message: integers as kind 0, floats as kind 5, bytes as kind 2."""
    out = []
    for number, value in fields:
        if isinstance(value, bytes):
            out += [_varint(number << 3 | 2), _varint(len(value)), value]
        elif isinstance(value, float):
            out += [_varint(number << 3 | 5), struct.pack("<f", value)]
        else:
            out += [_varint(number << 3), _varint(value % 2**64)]  # a negative value as two's complement
    return b"".join(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
