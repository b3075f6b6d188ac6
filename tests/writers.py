"""Every writer of the package, and the system's calls with which they change a folder, to be watched or to fail."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from folders import contents

import llama_fn as lf
from llama_fn import lora
from llama_fn.checkpoint.atomic import current
from llama_fn.checkpoint.files import write_json
from llama_fn.checkpoint.snapshot import save_snapshot
from llama_fn.training.curve import plot_curves
from llama_fn.training.data import encode_corpus

CONFIG = lf.Config(dim=8, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=402, hidden_dim=6, max_seq_len=16)
Writer = Callable[[Path, int], None]
CHANGES = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync", "chmod")


def params(which: int) -> lf.Params:
    return lf.init_params(lf.random.key(which), CONFIG)


def drawn(metrics: Path, place: Path) -> None:
    assert plot_curves(metrics, place)


def all_writers(texts: list[str], folder: Path) -> dict[str, Writer]:
    """Each writes its number 0, 1 or 2 to a place, the same bytes again and again; `folder` is for what they read."""
    words = lf.train_tokenizer(texts, CONFIG.vocab_size)
    for which in range(3):
        records = [{"step": step, "loss": step + which + 1.0} for step in (1, 2)]
        (folder / f"{which}").write_text("".join(json.dumps(record) + "\n" for record in records))

    def saved(format: str, shards: int | None = None, change: Callable = lambda x: x) -> Writer:
        return lambda place, which: lf.save(lf.Model(change(params(which)), words), place, format=format, shards=shards)

    return {
        "meta": saved("meta"), "two of meta": saved("meta", 2), "hf": saved("hf"), "three of hf": saved("hf", 3),
        "llama2c": saved("llama2c"), "quantized": saved("meta", change=lambda x: lf.quantize(x, "int8")),
        "adapter": lambda place, which: lora.save(lora.init(lf.random.key(which), params(0), 2), place, params(0)),
        "snapshot": lambda place, which: save_snapshot(params(which), place),
        "json": lambda place, which: write_json(place, {"number": str(which) * 500}),
        "corpus": lambda place, which: encode_corpus([f"story {which} " * 99], words, place),
        "curve": lambda place, which: drawn(folder / f"{which}", place)}


FOLDERS = ("meta", "two of meta", "hf", "three of hf", "llama2c", "quantized", "adapter", "snapshot")
FILES = ("json", "corpus", "curve")
WRITERS = (*FOLDERS, *FILES)


@contextmanager
def calls(monkeypatch, before: Callable[[str, tuple], None]) -> Iterator[None]:
    """`before` is told of each of the system's calls that change a folder, and may raise in its place."""
    with monkeypatch.context() as patch:
        for name in CHANGES:
            real = getattr(os, name)

            def call(*args, name=name, real=real, **kwargs):
                before(name, args)
                return None if name == "fsync" else real(*args, **kwargs)  # it takes long and changes nothing

            patch.setattr(os, name, call)
        yield


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.startswith(".")}


def readable(place: Path) -> dict[str, bytes]:
    """What `load` sees, of a folder or a file."""
    return visible(current(place) if place.is_dir() else place.parent)
