"""The manifest of a fine-tuning, ``finetune.json``: its numbers, and digests of its model and of its examples.

A run that is resumed is compared with its manifest, so that it cannot silently continue with another model, with other
examples, or with other numbers.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.mesh.shard import whole_leaves
from llama_fn.model.transformer import Params
from llama_fn.text import read_json
from llama_fn.training.examples import Examples
from llama_fn.training.lock import LOCK
from llama_fn.training.record import METRICS
from llama_fn.training.tuning import Tuning
from llama_fn.transforms.lora import Lora

MANIFEST = "finetune.json"


def manifest_of(params: Params, data: Sequence[Examples], tuning: Tuning, start: Lora | None) -> dict[str, Any]:
    """The manifest of a fine-tuning of ``params``, or of the adapter ``start`` on top of them.

    It is the same on any mesh, all of whose processes must call this.
    """
    return {**dataclasses.asdict(tuning), "model": _digest(whole_leaves(params)),
            "start": None if start is None else _digest(tree.leaves(start)),
            "examples": _digest([x for one in data for x in one])}


def check_manifest(folder: Path, manifest: dict, resume: bool) -> None:
    """Raise `ValueError` if the folder holds another run, or one that is not to be resumed, or something else."""
    file = folder / MANIFEST
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(place.name != LOCK for place in folder.iterdir())):
            raise ValueError(f"{folder} is not empty and holds no fine-tuning; choose another folder")
        if resume:
            raise FileNotFoundError(f"{folder}: there is no run to go on with")
        return
    if not resume:
        raise ValueError(f"{folder} holds a fine-tuning already; go on with it (resume), or choose another folder")
    before = read_json(file)
    before = before if isinstance(before, dict) else {}
    if changed := _changed(before, manifest):
        raise ValueError(f"{folder} holds a run with another {', '.join(changed)}; give the same options, model and "
                         "examples, or choose another folder")
    if before.get("steps") != manifest["steps"]:
        warnings.warn(f"{folder}: a run of {before.get('steps')} steps becomes one of {manifest['steps']}",
                      stacklevel=3)


def check_about(about: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise `ValueError` if a snapshot is not of the run with this manifest."""
    of = about.get("run")
    if not isinstance(of, dict) or _changed(of, manifest) or METRICS not in about:
        raise ValueError("of another run")


def _changed(before: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """The names of what differs from the run before, but for the number of steps."""
    now = json.loads(json.dumps(manifest))
    return [name for name, value in now.items() if name != "steps" and before.get(name) != value]


def _digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the shapes and numbers of tensors."""
    whole = hashlib.sha256()
    for x in tensors:
        whole.update(str((x.dtype, tuple(x.shape))).encode())
        whole.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
