"""Learning a SentencePiece vocabulary from texts."""

import io
import itertools
import threading
from collections import Counter
from collections.abc import Iterable

import sentencepiece as spm

from llama_fn.ranges import integer
from llama_fn.tokenizer import Tokenizer

LONGEST_LINE = 1 << 16  # characters; SentencePiece skips a longer line without a word, so it comes in parts
VOCABULARY = 1024  # tokens, where nobody says how many
COVERAGE = 0.99995  # of all characters; the rarest are bytes


def train_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Learn a BPE vocabulary with LLaMA 2's settings: byte fallback, single digits, no normalization.

    The vocabulary holds 3 special tokens, 256 bytes, the characters seen, and merges; the same texts give the same one.
    With `vocab_size` None it has 1024 tokens: fewer if the texts cannot fill it, more if it could not hold their
    characters. Raises `ValueError` if there is no text, if the texts cannot fill a given size, or if it is too small
    for their characters; an error raised by `texts` comes out as it is.
    """
    # All lines are read first. SentencePiece would rename whatever an iterator raises, even Ctrl-C.
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
        return _learn(lines, fits)  # the file then is that of a given size, to the last byte


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

    # In a thread of its own: it takes half a minute for 40 MB, and only the main one hears Ctrl-C.
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
    """How many characters get a token: the commonest that together make up COVERAGE of all."""
    counts: Counter[str] = Counter()
    for line in lines:  # all at once would be one call, which Ctrl-C does not interrupt
        counts.update(line)
    reached = itertools.accumulate(count for _, count in counts.most_common())
    return 1 + sum(total < COVERAGE * counts.total() for total in reached)
