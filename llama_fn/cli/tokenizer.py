"""`llama-fn tokenizer`: learn a vocabulary."""

from pathlib import Path
from typing import Annotated

import tyro

from llama_fn.checkpoint.atomic import replacing
from llama_fn.tokenizer_training import train_tokenizer
from llama_fn.training.texts import read_texts


def tokenizer(texts: Annotated[Path, tyro.conf.Positional], *, vocab_size: int | None = None,
              out: Path = Path("tokenizer.model"), force: bool = False) -> None:
    """Learn a tokenizer from texts: SentencePiece BPE with byte fallback, with LLaMA 2's settings.

    Args:
        texts: A text file, a JSON or JSON-lines file (the "text" of each record), or a folder of such files.
        vocab_size: The number of tokens: 3 special ones, 256 bytes, every character seen, and merges. By default 1024,
            or fewer if the texts have no more, or more if they have many different characters.
        out: The file to write.
        force: Replace an existing file.
    """
    if out.exists() and not force:
        raise ValueError(f"{out} exists; choose another --out, or replace it with --force")
    learned = train_tokenizer(read_texts(texts), vocab_size)
    with replacing(out) as beside:
        beside.write_bytes(learned.model)
    print(f"{out}: {learned.vocab_size} tokens")
