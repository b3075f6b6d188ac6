"""`run.json`: what a run is known by. Its plan by the numbers, its texts and its files by their content's digest."""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_fn.checkpoint.atomic import current
from llama_fn.checkpoint.files import write_json
from llama_fn.checkpoint.load import TOKENIZER
from llama_fn.text import read_json
from llama_fn.training.data import documents, no_text
from llama_fn.training.plan import Plan

RECORD = "run.json"
FILES = (TOKENIZER, "data/train.bin", "data/valid.bin")


class Text(NamedTuple):
    """A file of texts: its name, for people, and the SHA-256 of its documents, which alone counts."""

    name: str
    sha256: str


def digest_texts(files: Sequence[Path], under: Path) -> list[Text]:
    """Read all documents of all files of a file or folder `under`; files without any are left out.

    Raises what `documents` raises, and `ValueError` if there is no text at all.
    """
    texts = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: not a file; a run reads its texts several times, so write them to one first")
        whole, empty = hashlib.sha256(), True
        for document in documents(file):
            data = document.encode()
            whole.update(len(data).to_bytes(8, "little") + data)  # with its length, or two documents would equal one
            empty = False
        if not empty:
            texts.append(Text(file.name if file == under else str(file.relative_to(under)), whole.hexdigest()))
    if not texts:
        raise no_text(under)
    return texts


def write_record(folder: Path, plan: Plan, texts: Sequence[Text] | None, before: dict[str, Any] | None) -> None:
    """Write the plan, the texts (None if there are none to add), and the digests of the folder's files."""
    record = {"texts": None, **(before or {}), **dataclasses.asdict(plan)}
    if texts is not None:
        record["texts"] = [text._asdict() for text in texts]
    if "sha256" not in record:
        record["sha256"] = {name: _digest(place(folder, name)) for name in FILES}
    write_json(folder / RECORD, record)


def read_record(folder: Path, resume: bool) -> dict[str, Any] | None:
    """What is known of the run in a folder; None for a new run.

    Raises `FileNotFoundError` if there is none to resume, and `ValueError` for a folder that cannot be used.
    """
    if (folder / RECORD).is_file():
        if not resume:
            raise ValueError(f"{folder} holds a training run already; go on with it (resume), or choose another folder")
        record = read_json(folder / RECORD)
        texts, digests = (record.get("texts"), record.get("sha256", {})) if isinstance(record, dict) else (None, None)
        known = texts if isinstance(texts, list) else []
        right = all(isinstance(text, dict) and {*text} == {*Text._fields} and {*map(type, text.values())} == {str}
                    for text in known)
        if not (right and isinstance(digests, dict)):
            raise ValueError(f"{folder / RECORD}: not what a training run writes there")
        _check_numbers(folder / RECORD, record)
        return record
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no training run; choose another folder")
    if resume:
        raise FileNotFoundError(f"{folder}: there is no run to go on with")
    return None


def _check_numbers(file: Path, record: dict[str, Any]) -> None:
    """Raise `ValueError` that names the file, if the plan in it is not one that a run can have."""
    numbers = {field.name: record[field.name] for field in dataclasses.fields(Plan) if field.name in record}
    try:
        for name, value in numbers.items():
            if value is None:
                raise ValueError(f"{name} must be a number, got null")
        plan = Plan(**numbers)
        plan.check()
        plan.config()
        plan.optimizer()
    except ValueError as error:
        raise ValueError(f"{file}: not what a training run writes there: {error}") from None


def check_plan(folder: Path, before: dict[str, Any], plan: Plan) -> None:
    """Raise `ValueError` if the plan differs from the recorded one in more than its number of steps."""
    if changed := [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in vars(plan).items()
                   if name != "steps" and before.get(name) != value]:
        raise ValueError(f"{folder} holds a run of another plan: {'; '.join(changed)}")


def check_texts(folder: Path, before: dict[str, Any], texts: Sequence[Text]) -> None:
    """Raise `ValueError` that names the files, if the texts are not those of the run. Their names may have changed."""
    if before.get("texts") is None:
        raise ValueError(f"{folder} holds a run on the embedded stories; resume it without texts, or choose another "
                         "folder")
    if not isinstance(before["texts"], list):  # one name, as an earlier version wrote it
        warnings.warn(f"{folder / RECORD} has no digests of the texts: whether these are the same cannot be told",
                      stacklevel=2)
        return
    known = [Text(**text) for text in before["texts"]]
    was, now = ([text.sha256 for text in some] for some in (known, texts))
    old, current = {*was}, {*now}
    new = dict.fromkeys(text.name for text in texts if text.sha256 not in old)
    gone = dict.fromkeys(text.name for text in known if text.sha256 not in current)
    told = [f"{name} differs" for name in new if name in gone]
    told += [f"{name} is new" for name in new if name not in gone]
    told += [f"{name} is missing" for name in gone if name not in new]
    if not told and was != now:
        told = ["their order or number differs"]
    if told:
        more = f" and {len(told) - 3:,} more" if len(told) > 4 else ""
        raise ValueError(f"{folder} holds a run on other texts: {', '.join(told[:3] if more else told)}{more}; resume "
                         "without texts to go on with those of the run, or choose another folder")


def check_files(folder: Path, before: dict[str, Any] | None, names: Iterable[str]) -> None:
    """Raise `ValueError` if one of these files of the folder is not the recorded one."""
    known = (before or {}).get("sha256", {})
    for name in names:
        if name in known and _digest(place(folder, name)) != known[name]:
            raise ValueError(f"{folder / name}: damaged, or not of this run (its digest is not that in {RECORD}); "
                             "remove it and resume, with the texts of the run: it is made again from them")


def place(folder: Path, name: str) -> Path:
    """Where a file of a run is read. A model that was saved but not yet moved to its places has the tokenizer."""
    return (current(folder) if name == TOKENIZER else folder) / name


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
