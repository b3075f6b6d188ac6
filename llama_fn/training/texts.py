"""Files to documents: plain texts, prompts with completions, and dialogs, read one after another.

Only one document is in memory at a time, so that a file may be larger than memory (but for a .json file, which is one
value).
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_fn.text import json_lines, read_json, text_parts

JSON = (".json", ".jsonl", ".ndjson")
READ = (".txt", ".md", *JSON)
KINDS = ("text", "messages", "prompt")  # a record has one of these names
NEEDS = 'a record needs a string under "text", strings under "prompt" and "completion", or a dialog under "messages"'


class Prompt(NamedTuple):
    """A prompt, and the completion that the model is to learn."""

    prompt: str
    completion: str


class Dialog(NamedTuple):
    """Messages of system, user and assistant; the model is to learn the assistant's answers."""

    messages: tuple[Mapping[str, str], ...]


Document = str | Prompt | Dialog


def text_files(path: str | os.PathLike, leave_out: Path | None = None) -> list[Path]:
    """The files that `read_texts` reads: ``path`` itself, or the text files in that folder and the folders below it.

    The files of a folder are sorted by their paths. Text files end in .txt, .md, .jsonl, .ndjson or .json, in upper or
    lower case. One warning names the other files. The folder ``leave_out`` is skipped. Raises `FileNotFoundError`.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        return [path]
    files = []
    for folder, folders, names in os.walk(path, onerror=_raise):  # rglob would skip an unreadable folder in silence
        folders[:] = [name for name in folders if leave_out is None or (Path(folder) / name).resolve() != leave_out]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # not followed
        files += [Path(folder) / name for name in (*names, *links)]
    read = sorted(file for file in files if file.suffix.lower() in READ and file.is_file())
    others = [str(file.relative_to(path)) for file in sorted({*files} - {*read})]
    if others and read:
        more = f" and {len(others) - 3:,} more" if len(others) > 4 else ""
        warnings.warn(f"{path}: not read: {', '.join(others[:3] if more else others)}{more} (only {_globs()} are)",
                      stacklevel=2)
    return read


def read_texts(path: str | os.PathLike) -> Iterator[str]:
    """The texts of the documents of a file, or of all `text_files` of a folder, one after another (see `documents`).

    Raises `FileNotFoundError`, the errors of `documents`, and `ValueError` for a file or folder without any text.

    Example: ``tokenizer = lf.train_tokenizer(read_texts("my-texts/"), vocab_size=1024)``.
    """
    found = False
    for file in text_files(path):
        for document in documents(file):
            found = True
            yield plain(document)
    if not found:
        raise no_text(path)


def documents(file: Path) -> Iterator[Document]:
    """The documents of one file, without those that are only white space.

    A .jsonl or .ndjson file has one record in each line. A .json file is a list of records, a single record, or has
    one record in each line. A record is an object with a string under "text"; or with strings under "prompt" and
    "completion"; or with a dialog under "messages": a list of objects with strings under "role" and "content", which
    go (system,) user, assistant, user, ... and have an answer. Any other file is one plain text; one of more than
    4 MiB is cut at line ends into several documents of about that size.

    Raises `ValueError` that names the file and the line or record for text that is not UTF-8, for wrong JSON, and for a
    record of another kind.
    """
    if file.suffix.lower() in JSON:
        found: Iterator[Document] = (_document(*located) for located in records(file))
    else:
        found = text_parts(file)
    return (document for document in found if (text := plain(document)) and not text.isspace())


def plain(document: Document) -> str:
    """The text of a document: a prompt joined with its completion, or the messages of a dialog, one a line."""
    if isinstance(document, str):
        return document
    if isinstance(document, Prompt):
        return document.prompt + document.completion
    return "\n".join(message["content"] for message in document.messages)


def as_bytes(document: Document) -> bytes:
    """Bytes that differ for different documents, for digests."""
    if isinstance(document, str):
        return document.encode()
    return json.dumps(document, ensure_ascii=False, sort_keys=True).encode()


def no_text(path: str | os.PathLike) -> ValueError:
    """The error for a file or folder without any text."""
    return ValueError(f"{path}: no text in it" + (f" (looked for {_globs()})" if Path(path).is_dir() else ""))


def records(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a JSON file, after the place where it stands ("FILE, line 3")."""
    if file.suffix.lower() != ".json":
        yield from json_lines(file)
        return
    try:
        value = read_json(file)
    except ValueError as error:
        if "Extra data" not in str(error):  # a second value follows: one record in each line, in spite of the name
            raise
        yield from json_lines(file)
        return
    yield from ((f"{file}, record {i}", x) for i, x in enumerate(value, 1)) if isinstance(value, list) else [
        (str(file), value)]


def _document(where: str, record: Any) -> Document:
    """The document of a record that `_records` gave."""
    kinds = [kind for kind in KINDS if isinstance(record, dict) and kind in record]
    if len(kinds) != 1:
        has = f", not more than one of these; it has {' and '.join(kinds)}" if kinds else ""
        raise ValueError(f"{where}: {NEEDS}{has}")
    if kinds == ["messages"]:
        return Dialog(_messages(where, record["messages"]))
    names = ("text",) if kinds == ["text"] else ("prompt", "completion")
    if not all(isinstance(record.get(name), str) for name in names):
        raise ValueError(f"{where}: {NEEDS}")
    for name in names:
        _check_characters(f'{where}: the "{name}"', record[name])
    return record["text"] if kinds == ["text"] else Prompt(record["prompt"], record["completion"])


def _messages(where: str, messages: Any) -> tuple[Mapping[str, str], ...]:
    """The messages of a dialog, with nothing but their roles and contents."""
    if not isinstance(messages, list) or not all(
            isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
            for message in messages):
        raise ValueError(f'{where}: "messages" is a list of objects with strings under "role" and "content"')
    for i, message in enumerate(messages):
        _check_characters(f"{where}: message {i}", message["content"])
    roles = [message["role"] for message in messages]
    if not re.fullmatch("(system )?(user assistant )+(user )?", "".join(f"{role} " for role in roles)):
        raise ValueError(f"{where}: a dialog goes (system,) user, assistant, user, ... and has an answer to learn, got "
                         f"{', '.join(roles) or 'no message'}")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _check_characters(what: str, text: str) -> None:
    """Raise `ValueError` for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half a surrogate pair, which is no character") from None


def _globs() -> str:
    *most, last = (f"*{suffix}" for suffix in READ)
    return f"{', '.join(most)} and {last}"


def _raise(error: OSError) -> None:
    raise error
