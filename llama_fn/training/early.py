"""Files of tokens as earlier versions wrote them: token ids of 16 or 32 bits and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llama_fn.tokenizer import Tokenizer
from llama_fn.training.encode import Encoded
from llama_fn.training.shard import MAGIC, write_shard


def is_early(path: Path) -> bool:
    """Whether an earlier version wrote this file of tokens: it has some, and no header."""
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
    return begin not in (b"", MAGIC)


def convert_early(path: Path, tokenizer: Tokenizer) -> int:
    """Write a file of an earlier version as `write_shard` does now, and return the number of tokens.

    A document begins at each begin token, and all tokens are learned. Check the file's digest first: nothing in the
    file itself tells whether it is damaged.
    """
    width = 2 if tokenizer.vocab_size <= 2**16 else 4
    if path.stat().st_size % width:
        raise ValueError(f"{path}: not a file of tokens: its length is no multiple of {width} bytes")
    tokens = np.memmap(path, f"<u{width}", "r")
    begins = np.flatnonzero(tokens == tokenizer.bos_id)
    if not len(begins) or begins[0] or int(tokens.max()) >= tokenizer.vocab_size:
        raise ValueError(f"{path}: not a file of tokens of this tokenizer")

    def documents() -> Iterator[Encoded]:
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            yield Encoded(tokens[begin:end], None)

    return write_shard(path, tokenizer, documents())
