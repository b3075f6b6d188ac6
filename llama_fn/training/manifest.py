"""The manifest of a training run, ``run.json``: its plan, and digests of its texts and of its files.

A run that is resumed is compared with its manifest, so that it cannot silently continue with another plan, with other
texts, or with damaged files. The manifest is first written before the files are made, without their digests. So a run
that was killed while it made them can be resumed.
"""

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from llama_fn.checkpoint.atomic import current
from llama_fn.checkpoint.files import write_json
from llama_fn.checkpoint.load import TOKENIZER
from llama_fn.checkpoint.sealed import CHECKSUM, sealed, unsealed
from llama_fn.text import read_json
from llama_fn.tokenizer import load_tokenizer
from llama_fn.training.early import convert_early, is_early
from llama_fn.training.lock import LOCK
from llama_fn.training.placement import ON
from llama_fn.training.plan import Plan
from llama_fn.training.texts import as_bytes, documents, no_text

MANIFEST = "run.json"
FILES = (TOKENIZER, "data/train.bin", "data/valid.bin")
NO_FACTS: Mapping[str, Any] = MappingProxyType({})


class Text(NamedTuple):
    """A file of texts. Only the SHA-256 of its documents is compared; the name is there for messages."""

    name: str
    sha256: str


def digest_texts(files: Sequence[Path], under: Path) -> list[Text]:
    """Read all documents in ``files`` and give the name and digest of each file.

    ``under`` is the file or folder that the user named; names in the result are relative to it. Files without
    documents are left out. Raises the errors of `documents`, and `ValueError` if there is no text at all.
    """
    texts = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: not a file; a run reads its texts several times, so write them to one first")
        whole, empty = hashlib.sha256(), True
        for document in documents(file):
            data = as_bytes(document)
            whole.update(len(data).to_bytes(8, "little") + data)  # the length marks where a document ends
            empty = False
        if not empty:
            texts.append(Text(file.name if file == under else str(file.relative_to(under)), whole.hexdigest()))
    if not texts:
        raise no_text(under)
    return texts


def write_manifest(folder: Path, plan: Plan, texts: Sequence[Text] | None, previous: dict[str, Any] | None,
                   files: Sequence[str] = FILES, facts: Mapping[str, Any] = NO_FACTS) -> dict[str, Any]:
    """Write the manifest of a run, and return it.

    It holds everything in ``previous`` (the manifest so far, or None), the plan, the texts unless they are None, the
    digests of ``files``, unless ``previous`` has them, and ``facts`` of `facts_of`, which replace the earlier ones. No
    files are named before they are made.
    """
    numbers = {name: value for name, value in vars(plan).items() if value is not None}
    before = {name: value for name, value in (previous or {}).items() if name != ON}
    manifest = {"texts": None, **before, **numbers, **facts}
    if texts is not None:
        manifest["texts"] = [text._asdict() for text in texts]
    if not manifest.get("sha256"):
        manifest["sha256"] = {name: _digest(file_of(folder, name)) for name in files}
    if not (folder / MANIFEST).is_file() or read_json(folder / MANIFEST) != sealed(manifest):
        write_json(folder / MANIFEST, sealed(manifest))
    return manifest


def read_manifest(folder: Path, resume: bool) -> dict[str, Any] | None:
    """The manifest of the run in a folder; None if the folder is free for a new run.

    Raises `FileNotFoundError` if there is no run to resume. Raises `ValueError` for a folder that holds something
    else, for a run in the folder if ``resume`` is false, and for a manifest that is damaged or that no training run
    wrote.
    """
    if (folder / MANIFEST).is_file():
        if not resume:
            raise ValueError(f"{folder} holds a training run already; go on with it (resume), or choose another folder")
        manifest = read_json(folder / MANIFEST)
        wrong = ValueError(f"{folder / MANIFEST}: not what a training run writes there")
        if not isinstance(manifest, dict):
            raise wrong
        if CHECKSUM in manifest:  # earlier versions wrote none
            manifest = unsealed(manifest, folder / MANIFEST)
        texts, digests = manifest.get("texts"), manifest.get("sha256", {})
        known = texts if isinstance(texts, list) else []
        right = all(isinstance(text, dict) and {*text} == {*Text._fields} and {*map(type, text.values())} == {str}
                    for text in known)
        if not (right and isinstance(digests, dict)):
            raise wrong
        _check_numbers(folder / MANIFEST, manifest)
        return manifest
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder")
    if folder.is_dir() and not all(_is_of_no_run(place) for place in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no training run; choose another folder")
    if resume:
        raise FileNotFoundError(f"{folder}: there is no run to go on with")
    return None


def is_prepared(manifest: dict[str, Any]) -> bool:
    """Whether a run's files were complete when its manifest was written. Earlier versions had no digests at all."""
    return manifest.get("sha256") != {}


def _is_of_no_run(place: Path) -> bool:
    """Whether a run that was killed before its manifest was complete left this file."""
    return place.name == LOCK or bool(re.fullmatch(re.escape(f".{MANIFEST}.") + r"[0-9a-f]{8}\.part", place.name))


def _check_numbers(file: Path, manifest: dict[str, Any]) -> None:
    """Raise `ValueError` that names the file and the number, if the plan in a manifest is not a possible one."""
    numbers = {field.name: manifest[field.name] for field in dataclasses.fields(Plan) if field.name in manifest}
    try:
        for name, value in numbers.items():
            if value is None:
                raise ValueError(f"{name} must be a number, got null")
        plan = Plan(**numbers)
        plan.check()
        plan.config()
        plan.make_optimizer()
    except ValueError as error:
        raise ValueError(f"{file}: not what a training run writes there: {error}") from None


def check_plan(folder: Path, previous: dict[str, Any], plan: Plan) -> None:
    """Raise `ValueError` if the plan differs from the manifest's in more than the number of steps."""
    before = {**vars(Plan()), **previous}  # what an earlier version could not choose was today's default
    if changed := [f"{name} was {before[name]!r}, is {value!r}" for name, value in vars(plan).items()
                   if name != "steps" and before[name] != value]:
        raise ValueError(f"{folder} holds a run of another plan: {'; '.join(changed)}")


def check_texts(folder: Path, previous: dict[str, Any], texts: Sequence[Text]) -> None:
    """Raise `ValueError` that names the files, if the texts are not those of the run.

    Names and places of the files may have changed; contents and their order may not.
    """
    if previous.get("texts") is None:
        raise ValueError(f"{folder} holds a run on the embedded stories; resume it without texts, or choose another "
                         "folder")
    if not isinstance(previous["texts"], list):  # an earlier version wrote only a name
        warnings.warn(f"{folder / MANIFEST} has no digests of the texts: whether these are the same cannot be told",
                      stacklevel=2)
        return
    known = [Text(**text) for text in previous["texts"]]
    old, new = ([text.sha256 for text in some] for some in (known, texts))
    added = dict.fromkeys(text.name for text in texts if text.sha256 not in {*old})
    gone = dict.fromkeys(text.name for text in known if text.sha256 not in {*new})
    changes = [f"{name} differs" for name in added if name in gone]
    changes += [f"{name} is new" for name in added if name not in gone]
    changes += [f"{name} is missing" for name in gone if name not in added]
    if not changes and old != new:
        changes = ["their order or number differs"]
    if changes:
        more = f" and {len(changes) - 3:,} more" if len(changes) > 4 else ""
        raise ValueError(f"{folder} holds a run on other texts: {', '.join(changes[:3] if more else changes)}{more}; "
                         "resume without texts to go on with those of the run, or choose another folder")


def check_files(folder: Path, previous: dict[str, Any] | None, names: Iterable[str]) -> None:
    """Raise `ValueError` if the digest of one of these files differs from the manifest's."""
    known = (previous or {}).get("sha256", {})
    for name in names:
        if name in known and _digest(file_of(folder, name)) != known[name]:
            raise ValueError(f"{folder / name}: damaged, or not of this run (its digest is not that in {MANIFEST}); "
                             "remove it and resume, with the texts of the run: it is made again from them")


def convert_files(folder: Path, previous: dict[str, Any] | None) -> dict[str, Any] | None:
    """Convert files of tokens that an earlier version wrote, and return the manifest of the run without their digests.

    Their digests must have been checked. The manifest is written first, so that a killed program can do it again.
    """
    early = [file for name in FILES[1:] if (file := folder / name).is_file() and is_early(file)]
    if previous is None or not early or not file_of(folder, TOKENIZER).is_file():
        return previous
    without = {name: value for name, value in previous.items() if name != "sha256"}
    write_json(folder / MANIFEST, sealed(without))
    for file in early:
        convert_early(file, load_tokenizer(file_of(folder, TOKENIZER)))
    return without


def file_of(folder: Path, name: str) -> Path:
    """The path of a run's file.

    The tokenizer is part of the saved model, and may still lie in the folder of an interrupted save (see `current`).
    """
    return (current(folder) if name == TOKENIZER else folder) / name


def _digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
