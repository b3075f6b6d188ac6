"""Text to tokens and back: SentencePiece BPE with byte fallback, as LLaMA 2 uses it."""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece as spm

from llama_fn import tokenizer_json, tree
from llama_fn.text import read_json

LARGEST_FILE = 1 << 24  # bytes of a `tokenizer.model`; one of 256,000 tokens has a quarter of it
LARGEST_JSON = 1 << 26  # bytes of a `tokenizer.json`; that of LLaMA 2 has 2 MB, of 256,000 tokens 35


@tree.constant
@dataclass(frozen=True)
class Tokenizer:
    """A SentencePiece model, and tokens added to it. A constant in a pytree, as a config is.

    Two are equal if all that is given is equal. `added` are ids and names of tokens that the model does not have, as
    fine-tuning adds them, or has under another name. An id without a name ("") is a row of the weights that stands for
    no text, as padding of a vocabulary does. `special` are the ids of added tokens that decode to nothing, as begin and
    end do. `legacy` is transformers' word: what stands between special tokens is encoded as a text of its own, with
    SentencePiece's space before it; if not, only the first part of a text has that space.

    `chat_template` is the Jinja template of a folder's dialogs. None stands for LLaMA 2's format by Meta's rules, and
    "" for a folder of Hugging Face's that has no template. `end_ids` are tokens that end a generation, besides
    `eos_id`. `token_names` are what a template calls tokens by, as `("eos_token", "</s>")`, if not by the names of
    the model.

    Raises `ValueError` if `model` is no such model, and for ids that are none.
    """

    model: bytes = field(repr=False)
    added: tuple[tuple[int, str], ...] = ()
    special: tuple[int, ...] = ()
    legacy: bool = True
    chat_template: str | None = None
    end_ids: tuple[int, ...] = ()
    token_names: tuple[tuple[str, str], ...] = ()
    processor: spm.SentencePieceProcessor = field(init=False, repr=False, compare=False)
    names: dict[int, str] = field(init=False, repr=False, compare=False)  # of the added tokens
    specials: dict[str, int] = field(init=False, repr=False, compare=False)  # special and added tokens by their names

    def __post_init__(self) -> None:
        for id, name in self.added:
            if type(id) is not int or id < 0 or not isinstance(name, str):
                raise ValueError(f"an added token is an id of at least 0 and a name, got {id!r} and {name!r}")
        object.__setattr__(self, "processor", _processor(self.model))
        object.__setattr__(self, "names", dict(self.added))
        of_model = {self.processor.id_to_piece(id): id for id in range(self.processor.vocab_size())
                    if self._is_piece(id) and (self.processor.is_control(id) or self.processor.is_unknown(id))}
        object.__setattr__(self, "specials", of_model | {name: id for id, name in self.added if name})

    def __reduce__(self):
        return Tokenizer, tuple(getattr(self, each.name) for each in dataclasses.fields(self) if each.init)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max((self.processor.vocab_size() - 1, *self.names)) + 1

    @property
    def bos_id(self) -> int:
        """The token that begins a text; -1 if there is none."""
        return self.processor.bos_id()

    @property
    def eos_id(self) -> int:
        """The token that ends a text; -1 if there is none."""
        return self.processor.eos_id()

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a generation: `eos_id` and `end_ids`."""
        return frozenset((self.eos_id, *self.end_ids))

    def encode(self, text: str, bos: bool = True, eos: bool = False, special: bool = False) -> list[int]:
        """The tokens of a text. The name of a special or an added token written out in it ("<s>") is plain text,
        unless `special`: then it is that token, so never say it of what a user wrote.

        Raises `ValueError` for half a surrogate pair, which no UTF-8 text holds, and for a begin or an end that the
        tokenizer does not have.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: character {error.start} is the lone surrogate "
                             f"U+{ord(text[error.start]):04X} (was it read from bytes that are not UTF-8?)") from None
        for wanted, id, name in ((bos, self.bos_id, "bos"), (eos, self.eos_id, "eos")):
            if wanted and id < 0:
                raise ValueError(f"this tokenizer has no token to {'begin' if name == 'bos' else 'end'} a text with; "
                                 f"encode with {name}=False")
        ids = self._with_special(text) if special else self.processor.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int], continued: bool = False) -> str:
        """The text of tokens. Begin, end and special added tokens say nothing; other added tokens are their names; each
        byte that is not UTF-8 becomes one U+FFFD.

        Where SentencePiece puts a space before a text's first word, it takes it away here. Tokens that go on with a
        text are `continued`: they keep their space. Raises `ValueError` for a token outside the vocabulary.
        """
        return "".join(self.decode_stream(ids, continued))

    def decode_stream(self, ids: Iterable[int], continued: bool = False) -> Iterator[str]:
        """Pieces of text as tokens come, which join to exactly `decode` of all; a character waits for its last byte."""
        waiting, begin = b"", None if continued else []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size} tokens")
            if self._is_piece(token) and self.processor.is_byte(token):
                waiting += bytes([int(self.processor.id_to_piece(token)[3:5], 16)])
                text, waiting = _complete(waiting)
            else:
                text, waiting = "\ufffd" * len(waiting) + self._word(token, None if waiting else begin), b""
            begin = None if text else begin
            if text:
                yield text
        if waiting:
            yield "\ufffd" * len(waiting)

    def _word(self, token: int, begin: list[int] | None) -> str:
        """The text of a token that is no byte. `begin` are the tokens before it as long as they had no text, and takes
        this one: what becomes of the first space is for SentencePiece to say, by its model's own settings.
        """
        if not self._is_piece(token):
            return "" if token in self.special else self.names.get(token, "")
        if begin is not None:
            begin.append(token)
            return self.processor.decode(begin)
        if self.processor.is_control(token):
            return ""
        if self.processor.is_unknown(token):
            return self.processor.decode([token])
        return self.processor.id_to_piece(token).replace("\u2581", " ")

    def _is_piece(self, token: int) -> bool:
        """Whether the token means what SentencePiece says."""
        return token not in self.names and token < self.processor.vocab_size()

    def _with_special(self, text: str) -> list[int]:
        """The tokens of a text in which names stand for tokens; of two names at one place, the longer one."""
        if not self.specials:
            return self.processor.encode(text)
        parts = re.split(f"({'|'.join(map(re.escape, sorted(self.specials, key=len, reverse=True)))})", text)
        # Settings that come again in a SentencePiece model replace the first: this is add_dummy_prefix=false.
        within = self.processor if self.legacy else _processor(self.model + b"\x1a\x02\x18\x00")
        ids = self.processor.encode(parts[0])
        for name, rest in zip(parts[1::2], parts[2::2], strict=True):
            ids += [self.specials[name], *within.encode(rest)]
        return ids


def _processor(model: bytes) -> spm.SentencePieceProcessor:
    processor = spm.SentencePieceProcessor()
    try:
        if not model:
            raise RuntimeError("it is empty")
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {error}") from None
    return processor


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
    """Read a `tokenizer.model`, or a `tokenizer.json` of LLaMA's kind, with the tokens that were added there.

    Raises `FileNotFoundError`, or `ValueError` naming the file if it is something else.
    """
    path, is_json = Path(path), Path(path).suffix == ".json"
    largest = LARGEST_JSON if is_json else LARGEST_FILE
    if path.is_file() and (size := path.stat().st_size) > largest:
        raise ValueError(f"{path}: {size:,} bytes, at most {largest:,} are read; is it the right file?")
    settings = read_json(path) if is_json else None
    try:
        return tokenizer_of_json(settings) if is_json else Tokenizer(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def tokenizer_of_json(settings: Any, bos: str = "<s>", eos: str = "</s>") -> Tokenizer:
    """The tokenizer of a `tokenizer.json`. `bos` and `eos` are the names of the tokens that begin and end a text.

    Raises `ValueError` for another kind than LLaMA's.
    """
    model, legacy = tokenizer_json.rebuilt(settings, bos, eos)
    size = len(settings["model"]["vocab"])
    added = sorted((id, *token) for id, token in tokenizer_json.added_tokens(settings).items() if id >= size)
    return Tokenizer(model, tuple((id, name) for id, name, _ in added),
                     tuple(id for id, _, special in added if special), legacy)
