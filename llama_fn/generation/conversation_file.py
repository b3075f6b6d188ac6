"""A conversation as a JSON file: a list of messages, each with its role and its content."""

import json
from pathlib import Path

from llama_fn.checkpoint.atomic import replacing
from llama_fn.generation.conversation import Chat
from llama_fn.generation.messages import chat_of, dialog_of
from llama_fn.text import decode, parse
from llama_fn.tokenizer import Tokenizer


def write_chat(tokenizer: Tokenizer, chat: Chat, file: Path) -> None:
    """Write a conversation, so that `read_chat` returns the same tokens.

    Raises `ValueError` if the file exists, and if its folder does not.
    """
    if file.exists():
        raise ValueError(f"{file} exists; choose another name")
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent}: no such folder")
    with replacing(file) as beside:
        text = json.dumps(dialog_of(tokenizer, chat), indent=2, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")


def read_chat(tokenizer: Tokenizer, file: Path) -> Chat:
    """The conversation in a file. Raises `ValueError` for a file that holds none."""
    where = f"{file}: not a conversation as /save writes it"
    dialog = parse(decode(file.read_bytes(), where), where)
    try:
        if not isinstance(dialog, list):
            raise ValueError('expected a list of {"role": ..., "content": ...}')
        return chat_of(tokenizer, dialog)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
