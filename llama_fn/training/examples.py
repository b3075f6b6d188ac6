"""Examples to learn from: records of text, of prompt and completion, of chat or of preference, as padded rows.

All rows are in memory. A batch is a function of the rows, a random key and the number of the step.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama_fn import random
from llama_fn.random import Key
from llama_fn.text import read_text
from llama_fn.tokenizer import Tokenizer
from llama_fn.training.texts import JSON, no_text, records, text_files

OfDialog = Callable[[Tokenizer, Sequence[Any]], tuple[Tensor, Tensor]]  # `lf.dialog_tokens`
Row = tuple[list[int], list[bool]]


class Examples(NamedTuple):
    """Rows of tokens, padded to one length, and masks that are true at the tokens to learn.

    A preference is two rows, chosen and rejected, on an axis of their own before that of the tokens.
    """

    tokens: Int[Tensor, "n *r t"]
    mask: Bool[Tensor, "n *r t"]


def read_examples(path: str | os.PathLike, tokenizer: Tokenizer, of_dialog: OfDialog, context: int, *,
                  pairs: bool = False) -> Examples:
    """The examples of a file, or of all text files of a folder (see `text_files`).

    A record of a JSON file is one of these, where DIALOG is a list of messages as in `lf.Message`:

    - ``{"text": "..."}``: all tokens count. A text of a file that is not JSON is the same.
    - ``{"prompt": "...", "completion": "..."}``: the completion's tokens count, and the token that ends it.
    - ``{"messages": DIALOG}``: the assistant's answers count, and the tokens that end them.
    - with ``pairs``: ``{"prompt": "...", "chosen": "...", "rejected": "..."}``, or "messages" and a DIALOG in the place
      of the prompt; the two may also be lists with the assistant's message.

    ``of_dialog`` is `lf.dialog_tokens`. A row predicts at most ``context`` tokens. A longer text is cut into several
    rows. The end of any other example is cut off, and one of which no token to learn is left is left out; a warning
    counts them. Raises `FileNotFoundError`. Raises `ValueError` that names the file and the line for a record that is
    none of these, and `ValueError` if there is no example at all.
    """
    rows: list[list[Row]] = []
    cut = 0
    for where, record in _located(path):
        try:
            found = _pair(record, tokenizer, of_dialog) if pairs else _single(record, tokenizer, of_dialog, context)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        shortened = [[(ids[:context + 1], mask[:context + 1]) for ids, mask in example] for example in found]
        whole = [example for example in shortened if all(any(mask[1:]) for _, mask in example)]
        cut += sum(before != after for before, after in zip(found, shortened, strict=True))
        rows += whole
    if not rows:
        raise ValueError(f"{path}: no example in it with a token to learn within the context of {context} tokens"
                         ) if cut else no_text(path)
    if cut:
        warnings.warn(f"{path}: {cut:,} examples are longer than the context of {context} tokens; their ends are left "
                      "out", stacklevel=2)
    length = max(len(ids) for example in rows for ids, _ in example)
    tokens = torch.tensor([[ids + [0] * (length - len(ids)) for ids, _ in example] for example in rows])
    mask = torch.tensor([[list(counts) + [False] * (length - len(counts)) for _, counts in example]
                         for example in rows])
    return Examples(tokens, mask) if pairs else Examples(tokens[:, 0], mask[:, 0])


def split(examples: Examples) -> tuple[Examples, Examples | None]:
    """The examples for training, and about every twentieth for validation, chosen by a digest of its tokens.

    Equal examples stay together. Of fewer than 40 examples, none is held out.
    """
    digests = [hashlib.sha256(x.numpy().tobytes()).digest() for x in examples.tokens]
    held = torch.tensor([int.from_bytes(digest[:8], "big") % 20 == 0 for digest in digests])
    if len(held) < 40 or not held.any():
        return examples, None
    return Examples(*(x[~held] for x in examples)), Examples(*(x[held] for x in examples))


def batch(examples: Examples, key: Key, step: int, shape: tuple[int, int]) -> Examples:
    """The rows of one training step, with the axes "a b" of ``shape`` (micro-batches, examples of each) in front.

    The result depends on examples, key and step alone. Each epoch has an order of its own, in which every example
    comes once; a batch may end one epoch and begin the next.
    """
    count, size = len(examples.tokens), shape[0] * shape[1]
    places = range(step * size, step * size + size)
    orders = {epoch: random.permutation(random.fold_in(key, epoch), count) for epoch in {p // count for p in places}}
    chosen = torch.stack([orders[p // count][p % count] for p in places])
    return Examples(*(x[chosen].unflatten(0, shape) for x in examples))


def in_order(examples: Examples, size: int) -> Iterator[Examples]:
    """All examples in order, ``size`` at a time."""
    for begin in range(0, len(examples.tokens), size):
        yield Examples(*(x[begin:begin + size] for x in examples))


def _located(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """Each record, after the place where it stands; a file that is not JSON is one record with a text."""
    for file in text_files(path):
        if file.suffix.lower() in JSON:
            yield from records(file)
        elif (text := read_text(file)).strip():
            yield str(file), {"text": text}


def _single(record: Any, tokenizer: Tokenizer, of_dialog: OfDialog, context: int) -> list[list[Row]]:
    """The examples of one record, of one row each."""
    fields = set(record) if isinstance(record, dict) else set()
    if "messages" in fields:
        return [[_dialog(record["messages"], tokenizer, of_dialog)]]
    if {"prompt", "completion"} <= fields:
        return [[_answer(record["prompt"], record["completion"], tokenizer, of_dialog)]]
    if "text" not in fields:
        raise ValueError('a record needs "text", "prompt" and "completion", or "messages"'
                         + ' (for "chosen" and "rejected", say --dpo)' * ({"chosen", "rejected"} <= fields))
    ids = tokenizer.encode(_string(record["text"], "text"), eos=True)
    pieces = [ids[begin:begin + context + 1] for begin in range(0, len(ids) - 1, context)]
    return [[(piece, [True] * len(piece))] for piece in pieces]


def _pair(record: Any, tokenizer: Tokenizer, of_dialog: OfDialog) -> list[list[Row]]:
    """The two rows of a preference."""
    fields = set(record) if isinstance(record, dict) else set()
    if not ({"chosen", "rejected"} <= fields and {"prompt", "messages"} & fields):
        raise ValueError('a preference needs "prompt" or "messages", and "chosen" and "rejected"')
    prompt = record["messages"] if "messages" in fields else record["prompt"]
    return [[_answer(prompt, record[name], tokenizer, of_dialog) for name in ("chosen", "rejected")]]


def _answer(prompt: Any, answer: Any, tokenizer: Tokenizer, of_dialog: OfDialog) -> Row:
    """The tokens of a prompt and an answer, and a mask of the answer and the token that ends it."""
    if isinstance(prompt, list):
        answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": _string(answer, "answer")}]
        ids, mask = _dialog([*prompt, *answer], tokenizer, of_dialog)
        if not mask[-1]:
            raise ValueError("the dialog must end with the assistant's answer")
        begin = max(i for i, counts in enumerate(mask) if counts and not mask[i - 1])
        return ids, [False] * begin + mask[begin:]  # earlier answers belong to the prompt
    prompt = _string(prompt, "prompt")
    whole = tokenizer.encode(prompt + _string(answer, "answer"), eos=True)
    begin = _shared(tokenizer.encode(prompt), whole)  # the prompt's last letters may merge with the answer's first
    return whole, [False] * begin + [True] * (len(whole) - begin)


def _dialog(messages: Any, tokenizer: Tokenizer, of_dialog: OfDialog) -> Row:
    if not isinstance(messages, list):
        raise ValueError('"messages" must be a list of messages')
    tokens, mask = of_dialog(tokenizer, messages)
    return tokens.tolist(), mask.tolist()


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two lists have in common at their beginnings."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string, got {type(value).__name__}')
    return value
