"""The file of a SentencePiece model, as its `sentencepiece_model.proto` lays it out: its settings, and a new one.

Protocol buffers are numbered fields: a whole number in groups of 7 bits (kind 0), four bytes (5), or bytes with their
count before them (2), which may be a message again. That is all of it that is needed here.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of the whole
BPE = 2  # of the trainer's model types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of a piece


class Piece(NamedTuple):
    """A token's text, with U+2581 for a space; of several merges the one with the highest score comes first."""

    text: str
    score: float
    type: int = NORMAL


class Settings(NamedTuple):
    """What a model does to a text. The defaults are those of the format."""

    bpe: bool = False
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    normalized: bool = False
    remove_extra_whitespaces: bool = True
    user_defined_symbols: bool = False
    dummy_prefix: bool = True

    def unusual(self) -> list[str]:
        """Those that are not as in LLaMA's tokenizers, but for the dummy prefix."""
        usual = Settings(bpe=True, byte_fallback=True, remove_extra_whitespaces=False, dummy_prefix=self.dummy_prefix)
        each = zip(self._fields, self, usual, strict=True)
        return [f"{name}={mine}" for name, mine, theirs in each if mine != theirs]


def pieces_of(model: bytes) -> list[Piece]:
    """The pieces of a model that SentencePiece reads, by their ids."""
    messages = (dict(_fields(value)) for number, value in _fields(model) if number == PIECES)
    return [Piece(piece[1].decode(), *struct.unpack("<f", piece.get(2, bytes(4))), piece.get(3, NORMAL))
            for piece in messages]


def settings_of(model: bytes) -> Settings:
    """The settings of a model that SentencePiece reads."""
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(model):
        if number in (TRAINER, NORMALIZER):
            (trainer if number == TRAINER else normalizer).update(_fields(value))
    return Settings(trainer.get(3, 1) == BPE, bool(trainer.get(35, 0)), bool(trainer.get(24, 0)),
                    bool(normalizer.get(2, b"")), bool(normalizer.get(4, 1)),
                    any(piece.type == USER_DEFINED for piece in pieces_of(model)), bool(normalizer.get(3, 1)))


def bpe_model(pieces: Iterable[Piece], dummy_prefix: bool, ids: dict[str, int]) -> bytes:
    """A BPE model with byte fallback and without normalization, as LLaMA's are. `ids` are those of "unk", "bos", "eos"
    and "pad", -1 for none.
    """
    pieces = list(pieces)
    trainer = [(3, BPE), (4, len(pieces)), (35, 1)]
    for field, name in enumerate(("unk", "bos", "eos", "pad"), 40):
        trainer.append((field, ids[name]))
        if ids[name] >= 0:
            trainer.append((field + 5, pieces[ids[name]].text.encode()))
    messages = [(PIECES, _message([(1, text.encode()), (2, score), (3, type)])) for text, score, type in pieces]
    return _message([*messages, (TRAINER, _message(trainer)),
                     (NORMALIZER, _message([(1, b"identity"), (3, int(dummy_prefix)), (4, 0), (5, 1)]))])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _number(data, at)
        else:
            size, at = _number(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at:at + size], at + size
        yield tag >> 3, value


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _message(fields: Iterable[tuple[int, int | float | bytes]]) -> bytes:
    out = []
    for number, value in fields:
        if isinstance(value, bytes):
            out += [_varint(number << 3 | 2), _varint(len(value)), value]
        elif isinstance(value, float):
            out += [_varint(number << 3 | 5), struct.pack("<f", value)]
        else:
            out += [_varint(number << 3), _varint(value % 2**64)]  # a negative one in two's complement
    return b"".join(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
