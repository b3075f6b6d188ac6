"""Converts between a SentencePiece model and Hugging Face's ``tokenizer.json`` of the same LLaMA tokenizer.

The two formats describe merges differently. In ``tokenizer.json`` a merge is a pair of pieces, and pairs that come
first in the list are merged first. In SentencePiece, every pair that makes a piece may be merged, and the piece with
the highest score goes first. They agree if the list has all pairs that make a piece, one after another. `rebuilt`
checks this, and refuses any other tokenizer with an error that names the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama_fn.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, bpe_model

SPACE = "\u2581"
LONGEST_PIECE = 512  # characters; LLaMA's pieces have at most 16, and the time to read one grows with their square
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def written(pieces: Sequence[Piece], added: Mapping[int, tuple[str, bool]], prefix: bool, legacy: bool,
            bos_id: int) -> dict[str, Any]:
    """The ``tokenizer.json`` of a BPE model's pieces and of added tokens.

    `added` has the name of each added token, and whether it is special, by its id.

    With `prefix`, a space is put before a text. With `legacy`, also before every part of a text between special tokens.
    """
    ids = {piece.text: id for id, piece in enumerate(pieces) if piece.type == NORMAL}
    ranked = sorted(ids, key=lambda text: -pieces[ids[text]].score)
    merges = [list(pair) for text in ranked for pair in _pairs(text, ids)]
    special = {id: (piece.text, True) for id, piece in enumerate(pieces) if piece.type in (CONTROL, UNKNOWN)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    sequence, bos = {"Sequence": {"id": "A", "type_id": 0}}, pieces[bos_id].text
    begin = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos_id >= 0 else []
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    first = prefix and not legacy
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id, "content": name, **flags, "special": is_special}
                         for id, (name, is_special) in sorted({**special, **added}.items())],
        "normalizer": None if first else {"type": "Sequence", "normalizers": [PREPEND, REPLACE][not prefix:]},
        "pre_tokenizer": metaspace if first else None,
        "post_processor": {"type": "TemplateProcessing", "single": [*begin, sequence],
                           "pair": [*begin, sequence, *begin, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}} if begin else {}},
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {"type": "BPE", "dropout": None, "unk_token": next(x.text for x in pieces if x.type == UNKNOWN),
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False,
                  "vocab": {piece.text: id for id, piece in enumerate(pieces)}, "merges": merges}}


class Rebuilt(NamedTuple):
    """A SentencePiece model, and transformers' setting `legacy` (see `Tokenizer`)."""

    model: bytes
    legacy: bool


def rebuilt(settings: Mapping[str, Any], bos: str = "<s>", eos: str = "</s>") -> Rebuilt:
    """The SentencePiece model of a ``tokenizer.json``.

    `bos` and `eos` are the names of the tokens that begin and end a text; a name that the vocabulary does not have
    stands for no token. Raises `ValueError` for any other tokenizer than LLaMA's: BPE with byte fallback, without
    normalization.
    """
    model = settings.get("model") if isinstance(settings, Mapping) else None
    if not isinstance(model, Mapping):
        raise ValueError('no tokenizer.json: there is no "model"')
    steps = _steps(settings.get("normalizer"), "normalizers") + _steps(settings.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("type") == "ByteLevel" for step in steps):
        raise ValueError("a byte-level BPE, as LLaMA 3's, is no SentencePiece model and is not read")
    for name, only in (("type", "BPE"), ("byte_fallback", True), ("dropout", None), ("ignore_merges", False),
                       ("continuing_subword_prefix", None), ("end_of_word_suffix", None)):
        if model.get(name, None if name != "ignore_merges" else False) not in (only, *([""] if only is None else [])):
            raise ValueError(f"model.{name} is {model.get(name)!r}, only {only!r} can be read (LLaMA's BPE)")
    pieces = _vocabulary(model.get("vocab"))
    types = _types(pieces, settings, model.get("unk_token"))
    scores = _scores(pieces, types, model.get("merges"))
    prefix, legacy = _spaces(steps, pieces)
    ids = {"unk": types.index(UNKNOWN), "pad": -1}
    ids |= {name: pieces.index(text) if text in pieces else -1 for name, text in (("bos", bos), ("eos", eos))}
    for id in (ids["bos"], ids["eos"]):
        types[id] = CONTROL if id >= 0 else types[id]
    return Rebuilt(bpe_model(map(Piece, pieces, scores, types), prefix, ids), legacy)


def added_tokens(settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """The added tokens by their ids, each with its name and whether it is special.

    These are looked for in a text before anything else. Raises `ValueError` for a list of another form.
    """
    added = settings.get("added_tokens") or []
    try:
        found = {token["id"]: (str(token["content"]), bool(token.get("special"))) for token in added}
    except (TypeError, KeyError, AttributeError):
        raise ValueError('"added_tokens" is no list of tokens with an "id" and a "content"') from None
    if wrong := [id for id in found if type(id) is not int or id < 0]:
        raise ValueError(f'"added_tokens" has the id {wrong[0]!r}; ids are integers from 0 on')
    return found


def _vocabulary(vocab: Any) -> list[str]:
    """The pieces in the order of their ids."""
    if not isinstance(vocab, Mapping) or sorted(vocab.values(), key=repr) != sorted(range(len(vocab)), key=repr):
        raise ValueError("model.vocab should give every piece an id from 0 on, and every id to one piece")
    if (longest := max(map(len, vocab), default=0)) > LONGEST_PIECE:
        raise ValueError(f"model.vocab has a piece of {longest:,} characters, at most {LONGEST_PIECE:,} are read")
    return sorted(vocab, key=vocab.__getitem__)


def _types(pieces: list[str], settings: Mapping[str, Any], unknown: Any) -> list[int]:
    """The type of each piece, as SentencePiece numbers them."""
    unknown = "<unk>" if unknown is None else unknown
    if unknown not in pieces:
        raise ValueError(f"model.vocab has no piece {unknown!r} for what is unknown")
    if missing := BYTES.difference(pieces):
        raise ValueError(f"model.vocab lacks {len(missing)} of the 256 bytes, one is {min(missing)}")
    special = dict(added_tokens(settings).values())
    return [UNKNOWN if piece == unknown else BYTE if piece in BYTES else
            NORMAL if piece not in special else CONTROL if special[piece] else USER_DEFINED for piece in pieces]


def _scores(pieces: list[str], types: list[int], merges: Any) -> list[float]:
    """Scores with which SentencePiece merges in the order of the list."""
    every = set(pieces)
    ids = {piece: id for id, piece in enumerate(pieces) if types[id] == NORMAL}
    if not isinstance(merges, list):
        raise ValueError("model.merges is no list")
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair if isinstance(pair, list) else [pair])
             for pair in merges]
    if wrong := next((pair for pair in pairs if len(pair) != 2 or not all(
            isinstance(part, str) and part in every for part in pair)), None):
        raise ValueError(f"model.merges has {wrong!r}, which is no pair of pieces")
    made: dict[str, set] = {}
    last = None
    for pair in pairs:
        if (piece := "".join(pair)) not in ids or not ids.keys() >= set(pair):
            if piece not in every:
                raise ValueError(f"model.merges makes {piece!r}, which is not in model.vocab")
            continue  # a special token is never merged
        if piece != last and piece in made:
            raise ValueError(f"model.merges makes {piece!r} in two places: no SentencePiece model merges so")
        made.setdefault(piece, set()).add(pair)
        last = piece
    for piece in ids:
        if missing := set(_pairs(piece, ids)) - made.get(piece, set()):
            raise ValueError(f"model.merges lacks {' + '.join(min(missing))}: a SentencePiece model merges every pair "
                             "that makes a piece, so this was not made of one")
    order = [ids[piece] for piece in made]
    first = min(ids.values(), default=0)
    if order == sorted(order):  # the order in which SentencePiece itself numbers pieces
        return [float(first - id) if types[id] == NORMAL else 0.0 for id in range(len(pieces))]
    ranks = {id: rank for rank, id in enumerate(order)}
    return [float(-ranks.get(id, len(ranks))) if types[id] == NORMAL else 0.0 for id in range(len(pieces))]


def _pairs(text: str, pieces: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a text."""
    return [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in pieces and text[i:] in pieces]


def _spaces(steps: list[Mapping[str, Any]], pieces: list[str]) -> tuple[bool, bool]:
    """Whether a space is put before a text, and whether before every part of it between special tokens."""
    if steps in ([PREPEND, REPLACE], [REPLACE]):
        return PREPEND in steps, True
    if len(steps) == 1 and steps[0].get("type") == "Metaspace" and steps[0].get("replacement", SPACE) == SPACE:
        scheme = steps[0].get("prepend_scheme") or ("always" if steps[0].get("add_prefix_space", True) else "never")
        if not steps[0].get("split", True) or not any(SPACE in piece[1:] for piece in pieces):
            return scheme != "never", scheme == "always"
        raise ValueError("its pre_tokenizer splits a text at spaces, and there are pieces with spaces within")
    kinds = ", ".join(str(step.get("type")) for step in steps) or "nothing"
    raise ValueError(f"a text is prepared by {kinds}; only a space before the text and U+2581 for every space can be "
                     "read (LLaMA's Prepend and Replace, or Metaspace)")


def _steps(step: Any, parts: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer; one of type "Sequence" has several."""
    if step is None:
        return []
    if not isinstance(step, Mapping):
        raise ValueError(f"expected a normalizer or a pre_tokenizer, found {step!r}")
    if step.get("type") != "Sequence":
        return [step]
    return [part for each in step.get(parts) or [] for part in _steps(each, parts)]
