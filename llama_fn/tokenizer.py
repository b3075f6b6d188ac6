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

LARGEST_FILE = 1 << 24  # bytes of a `tokenizer.model`; a file of 256,000 tokens is a quarter of that
LARGEST_JSON = 1 << 26  # bytes of a `tokenizer.json`; LLaMA 2's has 2 MB, a file of 256,000 tokens 35 MB


@tree.constant
@dataclass(frozen=True)
class Tokenizer:
    """A SentencePiece model with the tokens that were added to it; a constant in a pytree, as `Config` is.

    ``model`` is the file of a SentencePiece model. ``added`` are the ids and names of tokens that fine-tuning added, or
    gave another name. An id with the name "" is a row of the weights that stands for no text, as padding does.
    ``special`` are the ids of added tokens that decode to nothing. ``legacy`` is a setting of transformers. If true,
    each part of a text between special tokens is encoded by itself, with SentencePiece's space before it; else only the
    first part gets that space.

    ``chat_template`` is the Jinja template of dialogs: None stands for LLaMA 2's format, and "" for a Hugging Face
    folder without a template. ``end_ids`` are tokens that end a generation, besides ``eos_id``. ``token_names`` are the
    names that a template has for tokens, as ``("eos_token", "</s>")``, where they differ from the model's. Raises
    `ValueError` if ``model`` is not a SentencePiece model, and for an added token that is not an id and a name.

    >>> small: lf.Tokenizer = lf.train_tokenizer(texts, 400)
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
    specials: dict[str, int] = field(init=False, repr=False, compare=False)  # ids of special and added tokens

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
        """The tokens that end a generation: `eos_id` and those of ``end_ids``."""
        return frozenset((self.eos_id, *self.end_ids))

    def encode(self, text: str, bos: bool = True, eos: bool = False, special: bool = False) -> list[int]:
        """The tokens of a text, with the begin token before and without the end token behind it by default.

        The name of a special or added token in the text, as "<s>", is plain text. With ``special`` it is that token
        instead: never set it for text that a user wrote. Raises `ValueError` for a lone surrogate, which no UTF-8 text
        holds, and for a begin or end token that the tokenizer does not have.
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
        """The text of tokens; begin, end and special added tokens are left out, and other added tokens are their names.

        Each byte that is not UTF-8 becomes one U+FFFD. SentencePiece puts a space before the first word of a text,
        which is left out here; if ``continued``, the tokens continue a text, and the space is kept. Raises `ValueError`
        for a token outside the vocabulary.
        """
        return "".join(self.decode_stream(ids, continued))

    def decode_stream(self, ids: Iterable[int], continued: bool = False) -> Iterator[str]:
        """The text of tokens piece by piece, as the tokens come; the pieces join to the `decode` of all tokens.

        A character of several tokens comes when its last byte does. Raises `ValueError` for a token outside the
        vocabulary.
        """
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
        """The text of a token that is not a byte.

        `begin` collects the tokens of a text as long as they have no text, this one included, so that SentencePiece
        decides about the space before the first word by the settings of its model. It is None after the first text.
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
        """Whether the token means what it means to SentencePiece, and is not an added token."""
        return token not in self.names and token < self.processor.vocab_size()

    def _with_special(self, text: str) -> list[int]:
        """The tokens of a text in which names stand for tokens. Where two names begin, the longer one is taken."""
        if not self.specials:
            return self.processor.encode(text)
        parts = re.split(f"({'|'.join(map(re.escape, sorted(self.specials, key=len, reverse=True)))})", text)
        # A setting that a model has twice has its last value: these bytes set add_dummy_prefix=false.
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
    """The text of the complete characters in the data, and the bytes of an incomplete character at its end."""
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
    """The tokenizer of a ``tokenizer.model`` file, or of a ``tokenizer.json`` of LLaMA's kind with its added tokens.

    Raises `FileNotFoundError` for a missing file, and `ValueError`, which names the file, for one of another kind.

    >>> tokenizer = lf.load_tokenizer("my-model/tokenizer.model")
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
    """The tokenizer of a ``tokenizer.json``; `bos` and `eos` are the names of the tokens that begin and end a text.

    Raises `ValueError` for another kind of tokenizer than LLaMA's.
    """
    model, legacy = tokenizer_json.rebuilt(settings, bos, eos)
    size = len(settings["model"]["vocab"])
    added = sorted((id, *token) for id, token in tokenizer_json.added_tokens(settings).items() if id >= size)
    return Tokenizer(model, tuple((id, name) for id, name, _ in added),
                     tuple(id for id, _, special in added if special), legacy)
