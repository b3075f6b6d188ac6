"""Models in folders: written and read without a tokenizer, compared bit for bit, and tampered with."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint import meta
from llama_fn.checkpoint.weights import params_of, weights_of


def bits(x: torch.Tensor) -> tuple:
    return x.dtype, x.shape, x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(a, b) -> bool:
    """Bit for bit, and in the same structure."""
    return tree.structure(a) == tree.structure(b) and all(
        bits(x) == bits(y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def write_meta(params: lf.Params, folder: Path, shards: int | None = None) -> None:
    meta.write_meta(weights_of(params), folder, shards, lambda size: None)


def read_meta(folder: Path, dtype: torch.dtype | None = None) -> lf.Params:
    return params_of(meta.open_meta(folder, dtype).checked(folder))


def edit_json(file: Path, **changes) -> None:
    """`...` takes an entry out."""
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: x for name, x in settings.items() if x is not ...}))


def edit_weights(file: Path, **changes) -> None:
    """Each change by a weight's last but one name in layer 0: a function of the weight, or None to leave it out."""
    state = torch.load(file)
    for name, change in changes.items():
        path = next(p for p in state if p.split(".")[-2] == name)
        weight = state.pop(path)
        if change is not None:
            state[path] = change(weight)
    torch.save(state, file)


def contents(folder: Path) -> dict[str, bytes]:
    """All there is in a folder, also what is hidden or in folders within."""
    return {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else b"" for file in folder.rglob("*")}


def failing(write, error: BaseException):
    """`write`, but only half of it arrives before the error."""
    def half(*args, **kwargs):
        write(*args, **kwargs)
        for file in args:
            if isinstance(file, Path) and file.is_file():
                os.truncate(file, file.stat().st_size // 2)
        raise error
    return half


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may become larger; the system says so by itself."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
