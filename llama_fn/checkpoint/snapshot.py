"""Snapshots: any tree of tensors, such as the state of a training run, in a folder with a digest of everything.

The folder holds these files:

- ``state.safetensors``: the leaves, each under its path in the tree. A tree of sharded leaves has one file for each
  process, ``state-00001-of-00004.safetensors``, which that process wrote: the parts that it has. A part that several
  processes have is written by one of them.
- ``manifest.json``: the dtype, shape and SHA-256 of every leaf, or of every part of it and in which file that is;
  whatever else the writer says about the snapshot; and a digest of the manifest itself.

A snapshot is read by any number of processes and by any plan: each process takes its own part of every leaf, from the
files that have numbers of it. The processes must see one file system.

The functions of ``torch.distributed.checkpoint`` are not used, for three reasons. Its table of contents is a pickle,
and reading one can run any code. It has no digests. Its safetensors writer copies all that a process writes into
memory, and cannot be given up. The files are those of its safetensors format all the same: its
``HuggingFaceStorageReader`` reads them into DTensors.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint.atomic import current, replacing_folder, sync
from llama_fn.checkpoint.files import inside, read_json, write_json
from llama_fn.checkpoint.parts import Part, common, part_of, writers
from llama_fn.checkpoint.sealed import sealed, unsealed
from llama_fn.checkpoint.snapshot_file import NAMES, digest_of, kind_of, opened_parts, spelled, write_parts
from llama_fn.mesh.ranks import Ranks, agreed, ranks_of
from llama_fn.mesh.sharded import is_sharded
from llama_fn.ops.weight import whole_shape

T = TypeVar("T")

STATE, MANIFEST = "state.safetensors", "manifest.json"
FILES = (STATE, "state-?????-of-?????.safetensors", MANIFEST)


def save_snapshot(value: Any, folder: str | os.PathLike, about: Mapping[str, Any] = MappingProxyType({}),
                  before_write: Callable[[], None] = lambda: None, ranks: Ranks | None = None) -> None:
    """Write a tree of tensors to a folder, with ``about`` (anything that JSON can hold) in the manifest.

    The write is atomic: until it is complete, what was there before stays. ``before_write`` is called before every
    write; an error that it raises ends the save and leaves nothing behind. Raises `OSError` with the file's name and a
    remedy. Raises `ValueError` for a leaf of a dtype that safetensors or this function does not know.

    If a leaf is sharded, all processes must call this, and an error of one of them is raised by all. ``about`` is
    that of rank 0. ``ranks`` None means all processes; a thread must pass a group of its own (see `all_ranks`).

    Example: ``save_snapshot(state, "run/snapshots/step-00001000")``.
    """
    whole = tree.paths(value, is_sharded)
    leaves = {name: _local(x).detach().cpu().contiguous() for name, x in whole.items()}
    if unknown := [name for name, x in leaves.items() if x.dtype not in NAMES]:
        raise ValueError(f"{unknown[0]}: a snapshot cannot hold {leaves[unknown[0]].dtype}")
    parts, ranks = {name: part_of(x) for name, x in whole.items()}, ranks_of(value) if ranks is None else ranks
    files = [STATE] if ranks.size == 1 else [f"state-{i + 1:05}-of-{ranks.size:05}.safetensors"
                                             for i in range(ranks.size)]
    chosen = writers(agreed(lambda: parts, ranks), {name: x.element_size() for name, x in leaves.items()})
    own = {name: part for name, part in parts.items() if chosen[name, part] == ranks.rank}

    with ExitStack() as stack:
        def begin() -> Path | None:
            return stack.enter_context(replacing_folder(folder, FILES)) if ranks.rank == 0 else None

        beside = agreed(begin, ranks)[0]
        assert beside is not None  # rank 0 gives it

        def write() -> dict[str, str]:
            file = beside / files[ranks.rank]
            digests = write_parts({name: leaves[name] for name in own}, own, file, before_write)
            sync(file)  # by the process that wrote it; the file may be on another machine's disk
            return digests

        digests = agreed(write, ranks)

        def finish() -> None:
            if ranks.rank == 0:
                if away := [name for name in files if not (beside / name).is_file()]:
                    raise FileNotFoundError(f"{beside / away[0]}: another process wrote it, and this one does not find "
                                            "it; the processes must see one file system")
                before_write()
                kinds = _kinds(whole, chosen, files, digests)
                write_json(beside / MANIFEST, sealed({"leaves": kinds, "about": dict(about)}))
                stack.close()

        agreed(finish, ranks)


def read_about(folder: str | os.PathLike) -> dict[str, Any]:
    """What `save_snapshot` was given as ``about``. Raises the errors of `load_snapshot` that concern the manifest."""
    return _read_manifest(current(folder))["about"]


def load_snapshot(like: T, folder: str | os.PathLike, ranks: Ranks | None = None) -> T:
    """Read the tree that `save_snapshot` wrote, bit for bit.

    ``like`` is a tree of the same structure, shapes and dtypes; each leaf is put on the device of its counterpart
    there. Leaves that are sharded there are read in part, however many processes wrote them. Then all processes must
    call this, and an error of one of them is raised by all; ``ranks`` is that of `save_snapshot`.

    Raises `FileNotFoundError` for a missing file. Raises `ValueError` that names every leaf that does not fit, for the
    state of another model or optimizer and for a damaged file. The digests find a single flipped bit.

    Example: ``state = load_snapshot(init_state(params, optimizer), "run/snapshots/step-00001000")``.
    """
    folder, wanted = current(folder), tree.paths(like, is_sharded)
    found: dict[str, Tensor] = {}

    def read() -> None:
        known = _read_manifest(folder)["leaves"]
        kinds = {name: {**kind_of(_local(x)), "shape": [*whole_shape(x)]} for name, x in wanted.items()}
        wrong = [f"missing: {name}" for name in wanted if name not in known]
        wrong += [f"unknown: {name}" for name in known if name not in wanted]
        wrong += [f"{name}: should be {spelled(kinds[name])}, is {spelled(kind)}" for name, kind in known.items()
                  if name in wanted and spelled(kind) != spelled(kinds[name])]
        if not wrong:
            found.update({name: torch.empty_like(_local(x), device="cpu") for name, x in wanted.items()})
            wrong += _read_parts(folder, known, {name: part_of(x) for name, x in wanted.items()}, found)
        if wrong:
            raise ValueError(f"{folder}: {len(wrong)} leaves do not fit this run:\n  " + "\n  ".join(wrong))

    agreed(read, ranks_of(like) if ranks is None else ranks)
    local = {name: found[name].to(_local(x).device) for name, x in wanted.items()}
    return tree.map_with_path(lambda name, x: x._replace(local=local[name]) if is_sharded(x) else local[name], like,
                              is_leaf=is_sharded)


def _local(x: Any) -> Tensor:
    """The tensor of a leaf that this process has."""
    return x.local if is_sharded(x) else x


def _kinds(whole: Mapping[str, Any], chosen: Mapping[tuple[str, Part], int], files: list[str],
           digests: list[dict[str, str]]) -> dict[str, Any]:
    """What the manifest says about each leaf."""
    kinds: dict[str, Any] = {name: {**kind_of(_local(x)), "shape": [*whole_shape(x)]} for name, x in whole.items()}
    for (name, part), rank in chosen.items():
        if len(files) == 1:
            kinds[name]["sha256"] = digests[rank][name]
        else:
            kinds[name].setdefault("parts", []).append({"file": files[rank], **part._asdict(),
                                                        "sha256": digests[rank][name]})
    return kinds


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    manifest = unsealed(read_json(file), file)
    if not (isinstance(manifest.get("leaves"), dict) and isinstance(manifest.get("about"), dict)):
        raise ValueError(f"{file}: not the manifest of a snapshot")
    return manifest


def _stored(folder: Path, known: Mapping[str, Any]) -> dict[str, dict[str, tuple[Part, str]]]:
    """For each file, the part and the digest of each leaf in it."""
    files: dict[str, dict[str, tuple[Part, str]]] = {}
    try:
        for name, kind in known.items():
            for part in kind.get("parts", [{"file": STATE, "start": [0] * len(kind["shape"]), **kind}]):
                where = Part(tuple(map(int, part["start"])), tuple(map(int, part["shape"])))
                files.setdefault(part["file"], {})[name] = where, str(part.get("sha256"))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{folder / MANIFEST}: not the manifest of a snapshot") from None
    return files


def _read_parts(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Part],
                found: Mapping[str, Tensor]) -> list[str]:
    """Fill the tensors ``found``, which hold the parts ``wanted``; the result is a line for each damaged leaf."""
    wrong, left = {}, {name: part.size for name, part in wanted.items()}
    for file, parts in [(inside(folder, name), parts) for name, parts in _stored(folder, known).items()]:
        needed = {leaf: shared for leaf, (part, _) in parts.items()
                  if (shared := common(wanted[leaf], part)).size or not part.size}
        if not needed:
            continue
        kinds = {leaf: {"dtype": known[leaf]["dtype"], "shape": [*part.shape]} for leaf, (part, _) in parts.items()}
        with opened_parts(file, kinds) as tensor:
            for leaf, shared in needed.items():
                (part, digest), x = parts[leaf], tensor(leaf)
                if digest_of(x) != digest:
                    wrong[leaf] = f"{leaf}: damaged, its digest differs"
                found[leaf][shared.within(wanted[leaf])].copy_(x[shared.within(part)])
                left[leaf] -= shared.size
    wrong |= {leaf: f"{leaf}: {count} of its numbers are in no file" for leaf, count in left.items() if count > 0}
    return list(wrong.values())
