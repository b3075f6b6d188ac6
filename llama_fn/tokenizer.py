"""Text to tokens and back: SentencePiece BPE with byte fallback, as LLaMA 2 uses it."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece as spm

from llama_fn import tree
from llama_fn.ranges import integer

LARGEST_FILE = 1 << 24  # bytes of a `tokenizer.model`; one of 256,000 tokens has a quarter of it
LONGEST_LINE = 1 << 16  # characters; SentencePiece skips a longer line without a word, so it comes in parts


@tree.constant
@dataclass(frozen=True)
class Tokenizer:
    """A SentencePiece model. Equal if their files are; a constant in a pytree, as a config is.

    Raises `ValueError` if the bytes are not such a model.
    """

    model: bytes
    processor: spm.SentencePieceProcessor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        processor = spm.SentencePieceProcessor()
        try:
            if not self.model:
                raise RuntimeError("it is empty")
            processor.LoadFromSerializedProto(self.model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(self.model)} bytes): {error}") from None
        object.__setattr__(self, "processor", processor)

    def __reduce__(self):
        return Tokenizer, (self.model,)

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    @property
    def bos_id(self) -> int:
        """The token that begins a text."""
        return self.processor.bos_id()

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        return self.processor.eos_id()

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """The tokens of a text. Special tokens written out in it ("<s>") are plain text.

        Raises `ValueError` for half a surrogate pair, which no UTF-8 text holds.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: character {error.start} is the lone surrogate "
                             f"U+{ord(text[error.start]):04X} (was it read from bytes that are not UTF-8?)") from None
        return [self.bos_id] * bos + self.processor.encode(text) + [self.eos_id] * eos

    def decode(self, ids: Sequence[int], continued: bool = False) -> str:
        """The text of tokens; begin and end say nothing, and each byte that is not UTF-8 becomes one U+FFFD.

        SentencePiece puts a space before a text's first word and takes it away here. Tokens that go on with a text
        are `continued`: they keep their space. Raises `ValueError` for a token outside the vocabulary.
        """
        return "".join(self.decode_stream(ids, continued))

    def decode_stream(self, ids: Iterable[int], continued: bool = False) -> Iterator[str]:
        """Pieces of text as tokens come, which join to exactly `decode` of all; a character waits for its last byte."""
        waiting, first = b"", not continued
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size} tokens")
            if self.processor.is_byte(token):
                waiting += bytes([int(self.processor.id_to_piece(token)[3:5], 16)])
                text, waiting = _complete(waiting)
            else:
                text, waiting = "\ufffd" * len(waiting) + self._word(token, first), b""
            first = first and self.processor.is_control(token)
            if text:
                yield text
        if waiting:
            yield "\ufffd" * len(waiting)

    def _word(self, token: int, first: bool) -> str:
        if self.processor.is_control(token):
            return ""
        if self.processor.is_unknown(token):
            return " \u2047 "
        word = self.processor.id_to_piece(token).replace("\u2581", " ")
        return word.removeprefix(" ") if first else word


def _complete(data: bytes) -> tuple[str, bytes]:
    """The characters that `data` completes, and the bytes of one that it does not."""
    text = ""
    while data:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[:error.start].decode()
            data = data[error.start:]
            if error.reason == "unexpected end of data":
                return text, data
            text, data = text + "\ufffd", data[1:]
    return text, b""


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a `tokenizer.model`. Raises `FileNotFoundError`, or `ValueError` naming the file if it is something else."""
    path = Path(path)
    try:
        if path.is_file() and (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes, at most {LARGEST_FILE:,} are read; is it the right file?")
        return Tokenizer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a BPE vocabulary with LLaMA 2's settings: byte fallback, single digits, no normalization.

    The vocabulary holds 3 special tokens, 256 bytes, the characters seen, and merges; the same texts give the same one.
    Raises `ValueError` if there is no text, or if the text cannot fill the vocabulary.
    """
    vocab_size = integer("train_tokenizer: vocab_size", vocab_size)
    lines = (line[start:start + LONGEST_LINE] for text in texts for line in text.splitlines() if line.strip()
             for start in range(0, len(line), LONGEST_LINE))
    out = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=out, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
            split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
            normalization_rule_name="identity", character_coverage=0.99995, max_sentence_length=4 * LONGEST_LINE,
            num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} tokens can be learned from these texts: "
                         f"{str(error).split(']')[-1].strip() or error}") from None
    return Tokenizer(out.getvalue())
