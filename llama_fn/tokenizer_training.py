"""Learning a SentencePiece vocabulary from texts."""

import io
import itertools
import threading
from collections import Counter
from collections.abc import Iterable

import sentencepiece as spm

from llama_fn.ranges import integer
from llama_fn.tokenizer import Tokenizer

LONGEST_LINE = 1 << 16  # characters; SentencePiece silently skips longer lines, so they are cut
VOCABULARY = 1024  # tokens by default
COVERAGE = 0.99995  # of all characters get a token; the rarest are written as bytes


def train_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Learn a BPE vocabulary from texts with LLaMA 2's settings: byte fallback, single digits, no normalization.

    The vocabulary has 3 special tokens, 256 bytes, the characters of the texts, and merges. The same texts give the
    same one. With ``vocab_size`` None it has 1024 tokens: fewer if the texts are too short for that, more if their
    characters need more. Raises `ValueError` for no text, and for a ``vocab_size`` that the texts cannot fill or that
    is too small for their characters. An error that the iterator ``texts`` raises is passed on.

    >>> tokenizer = lf.train_tokenizer(texts, 400)
    """
    # Read all lines first: SentencePiece replaces an error that an iterator raises by its own, even Ctrl-C.
    size = vocab_size if vocab_size is None else integer("train_tokenizer: vocab_size", vocab_size)
    lines = [line[start:start + LONGEST_LINE] for text in texts for line in text.splitlines() if line.strip()
             for start in range(0, len(line), LONGEST_LINE)]
    if not lines:
        raise ValueError(f"no tokenizer of {size or VOCABULARY} tokens can be learned from these texts: they are empty")
    if size is not None:
        if size < 260:
            raise ValueError(f"no tokenizer of {size} tokens can be learned from these texts: 3 special tokens and 256 "
                             "bytes alone are 259; give a larger vocab_size")
        return _learn(lines, size)
    needed = 3 + 256 + _frequent_characters(lines)
    size = VOCABULARY if needed < VOCABULARY else 2 * needed
    try:
        return _learn(lines, size)
    except ValueError:
        fits = _learn(lines, size, hard_vocab_limit=False).vocab_size
        return _learn(lines, fits)  # so that the file equals that of a given size, byte for byte


def _learn(lines: list[str], vocab_size: int, hard_vocab_limit: bool = True) -> Tokenizer:
    out, failed = io.BytesIO(), []

    def learn() -> None:
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=out, model_type="bpe", vocab_size=vocab_size,
                hard_vocab_limit=hard_vocab_limit, byte_fallback=True, split_digits=True,
                allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
                character_coverage=COVERAGE, max_sentence_length=4 * LONGEST_LINE, num_threads=1, minloglevel=2)
        except Exception as error:
            failed.append(error)

    # It takes half a minute for 40 MB. Ctrl-C interrupts only the main thread, so the work is done in another.
    thread = threading.Thread(target=learn, daemon=True)
    thread.start()
    thread.join()
    if failed and not isinstance(failed[0], RuntimeError | ValueError):
        raise failed[0]
    if failed:
        raise ValueError(f"no tokenizer of {vocab_size} tokens can be learned from these texts: "
                         f"{str(failed[0]).split(']')[-1].strip() or failed[0]}")
    return Tokenizer(out.getvalue())


def _frequent_characters(lines: list[str]) -> int:
    """How many characters get a token: the most frequent ones, which together are COVERAGE of all characters."""
    counts: Counter[str] = Counter()
    for line in lines:  # line by line, so that Ctrl-C can interrupt it
        counts.update(line)
    reached = itertools.accumulate(count for _, count in counts.most_common())
    return 1 + sum(total < COVERAGE * counts.total() for total in reached)
