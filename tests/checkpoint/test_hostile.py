"""Hostile files: each is refused with an error that names it, and no code in it is run.

A load either gives the whole model or raises, so that what is refused leaves no part of a tree.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import edit_json, same
from safetensors.torch import load_file, save_file

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint.meta import meta_name
from llama_fn.checkpoint.weights import flat_shape

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = [("meta", "params.json"), ("meta", "consolidated.00.pth"), ("meta", "tokenizer.model"), ("hf", "config.json"),
         ("hf", INDEX), ("hf", FIRST), ("hf", SECOND), ("hf", "tokenizer.model"), ("hf", "tokenizer.json"),
         ("hf", "tokenizer_config.json"), ("one", "model.safetensors"),
         ("llama2c", "model.bin"), ("llama2c", "tokenizer.model")]
ABSURD = 10**9


@pytest.fixture
def make(model, tmp_path) -> Callable[[str], Path]:
    """Writes a model in a format ("hf" in two files, "one" in one) to a folder of its own."""
    def saved(format: str) -> Path:
        lf.save(model, tmp_path / format, format="hf" if format == "one" else format,
                shards=2 if format == "hf" else None)
        return tmp_path / format
    return saved


def refused(folder: Path, message: str) -> None:
    """Refused with and without a cast. A shape may cost memory only if the file holds that many numbers."""
    for dtype in (None, torch.float64):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            lf.load(folder, dtype=dtype)


class Trap:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


# --- damage


@pytest.mark.parametrize("format, name", FILES)
def test_a_file_that_ends_early_is_refused_wherever_it_ends(make, format, name):
    folder = make(format)
    size = (folder / name).stat().st_size
    for part in reversed(range(64)):
        os.truncate(folder / name, size * part // 64)
        with pytest.raises(ValueError, match=re.escape(name)):
            lf.load(folder)


@pytest.mark.parametrize("format, name", FILES)
@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_opened(make, put, format, name):
    """To open a pipe without a writer would wait forever."""
    folder = make(format)
    (folder / name).unlink()
    put(folder / name)
    refused(folder, re.escape(name))


# --- code


@pytest.mark.parametrize("format, name", [
    ("meta", "consolidated.00.pth"), ("meta", "consolidated.01.pth"), ("one", "model.safetensors"),
    ("one", "pytorch_model.bin"), ("llama2c", "model.bin"),
])
def test_code_in_any_file_of_weights_is_never_run(make, tmp_path, format, name):
    folder, canary, trap = make(format), tmp_path / "canary", tmp_path / "trap"
    torch.save({"tok_embeddings.weight": Trap(canary)}, trap)
    (folder / name).write_bytes(trap.read_bytes())
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    refused(folder, re.escape(name))
    assert not canary.exists()
    torch.load(trap, weights_only=False)
    assert canary.exists()  # proves that the trap works


# --- other places


@pytest.mark.parametrize("name", ["../{0}", "{1}/{0}", "sub/{0}", "./{0}", "sub/../{0}", "..", ".", "", "{0}\0"])
def test_an_index_that_points_elsewhere_is_refused(make, tmp_path, name):
    folder = make("hf")
    (folder / "sub").mkdir()
    for place in (tmp_path, folder / "sub"):
        (place / SECOND).write_bytes((folder / SECOND).read_bytes())
    name = name.format(SECOND, tmp_path)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={weight: name if file == SECOND else file for weight, file in index.items()})
    refused(folder, rf"{re.escape(repr(name))} is not the name of a file in this folder|no such file")


@pytest.mark.parametrize("format, name", FILES)
def test_a_link_out_of_the_folder_is_refused(make, model, tmp_path, format, name):
    folder, elsewhere = make(format), tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = folder / name
    file.rename(elsewhere / name)
    for link in (elsewhere / name, Path("..") / "elsewhere" / name):
        file.symlink_to(link)
        refused(folder, re.escape(f"{file}: a link to {elsewhere / name}, outside the folder"))
        file.unlink()
    (elsewhere / name).rename(folder / "renamed")
    file.symlink_to("renamed")
    assert same(lf.load(folder), model)


def test_a_link_in_the_place_of_an_interrupted_save_is_not_followed(make, model):
    """`.complete` must be a folder, which is what a save leaves."""
    folder, elsewhere = make("meta"), make("hf")
    (folder / ".complete").symlink_to(elsewhere)
    (elsewhere / "config.json").unlink()
    assert same(lf.load(folder), model)


@pytest.mark.parametrize("format", ["meta", "hf", "llama2c"])
def test_a_tokenizer_above_is_read_but_no_link_from_there(make, model, tmp_path, format):
    folder = make(format)
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    assert same(lf.load(folder), model)
    (folder / "tokenizer.model").symlink_to("../tokenizer.model")  # as people share one among several models
    assert same(lf.load(folder), model)
    (folder / "tokenizer.model").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tokenizer.model").rename(tmp_path / "elsewhere" / "tokenizer.model")
    (tmp_path / "tokenizer.model").symlink_to("elsewhere/tokenizer.model")
    refused(folder, r"tokenizer\.model: a link to .*, outside the folder")


@pytest.mark.parametrize("format", ["meta", "hf", "one", "llama2c"])
def test_the_cache_of_hugging_face_is_read(make, model, tmp_path, format):
    """Its files are links to blobs beside the snapshots; the same links anywhere else are refused."""
    folder, cache = make(format), tmp_path / "models--llama"
    for place in (cache / "blobs", cache / "snapshots" / "0123abcd", cache / "others" / "0123abcd"):
        place.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / f"{i:040x}")
        for kind in ("snapshots", "others"):
            (cache / kind / "0123abcd" / file.name).symlink_to(f"../../blobs/{i:040x}")
    assert same(lf.load(cache / "snapshots" / "0123abcd"), model)
    (tmp_path / "current").symlink_to(cache / "snapshots" / "0123abcd")
    assert same(lf.load(tmp_path / "current"), model)
    refused(cache / "others" / "0123abcd", "a link to .*blobs.*, outside the folder")


# --- settings and indices


@pytest.mark.parametrize("format, name", [(format, name) for format, name in FILES if name.endswith(".json")])
@pytest.mark.parametrize("content", ["[" * 10**5, '{"a":' * 10**5, "[1]", "null", "1" * 5000, '{"dim": NaNaN}'],
                         ids=["deep list", "deep object", "list", "null", "number", "no number"])
def test_json_that_is_no_object_or_no_json_is_refused(make, format, name, content):
    folder = make(format)
    (folder / name).write_text(content)
    refused(folder, rf"{re.escape(name)}: (not JSON|expected a JSON object)")


@pytest.mark.parametrize("format, name, changes", [
    ("meta", "params.json", {"n_layers": ABSURD}), ("meta", "params.json", {"dim": 48 * ABSURD}),
    ("meta", "params.json", {"vocab_size": ABSURD}), ("meta", "params.json", {"multiple_of": ABSURD}),
    ("hf", "config.json", {"num_hidden_layers": ABSURD}), ("hf", "config.json", {"vocab_size": ABSURD}),
    ("one", "config.json", {"hidden_size": 48 * ABSURD, "head_dim": 8 * ABSURD}),
    ("one", "config.json", {"intermediate_size": ABSURD}),
])
def test_absurd_sizes_are_refused(make, format, name, changes):
    """The error comes before a tree or memory of that size is allocated."""
    folder = make(format)
    edit_json(folder / name, **changes)
    refused(folder, f"(?s){re.escape(str(folder))}.*{max(changes.values())}")


@pytest.mark.parametrize("field", range(7))
@pytest.mark.parametrize("value", [2**31 - 2, 0, -1, -2**31])
def test_absurd_sizes_in_a_header_of_llama2c_are_refused(make, field, value):
    """The sign of the vocabulary size is a flag. Every other number must agree with the length of the file."""
    folder = make("llama2c")
    content = bytearray((folder / "model.bin").read_bytes())
    struct.pack_into("<i", content, 4 * field, value)
    (folder / "model.bin").write_bytes(content)
    refused(folder, r"model\.bin: (not a checkpoint of llama2\.c|its header implies)")


@pytest.mark.parametrize("index", [[], {}, None, 5, "model.safetensors", {"lm_head.weight": 5},
                                   {"lm_head.weight": None}, {"lm_head.weight": [FIRST]}])
def test_an_index_of_no_files_is_refused(make, index):
    folder = make("hf")
    edit_json(folder / INDEX, weight_map=index)
    refused(folder, rf'{re.escape(INDEX)}: expected the names of files under "weight_map"')
    edit_json(folder / INDEX, weight_map=...)
    refused(folder, rf'{re.escape(INDEX)}: expected the names of files under "weight_map"')


def test_an_index_that_is_wrong_is_refused(make):
    folder = make("hf")
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=index | {"lm_head.weight": FIRST})
    refused(folder, rf"lm_head\.weight: the index says {FIRST}, but it is in {SECOND}")
    edit_json(folder / INDEX, weight_map=index | {"no.weight": FIRST})
    refused(folder, rf"no\.weight: the index says {FIRST}, but it is nowhere")
    edit_json(folder / INDEX, weight_map=index | {"lm_head.weight": "model-3.safetensors"})
    refused(folder, r"model-3\.safetensors: no such file")


def test_a_weight_in_two_files_is_refused(make):
    folder = make("hf")
    save_file(load_file(folder / FIRST) | {"lm_head.weight": torch.zeros(401, 48)}, folder / FIRST)
    refused(folder, rf"duplicate: lm_head\.weight in {FIRST} and in {SECOND}")


def test_weights_told_in_two_ways_are_refused(make):
    folder = make("hf")
    save_file(load_file(folder / FIRST) | load_file(folder / SECOND), folder / "model.safetensors")
    refused(folder, rf"both model\.safetensors and {re.escape(INDEX)} tell where the weights are")


def test_a_tied_head_that_is_no_number_is_that_of_the_embedding(make, model):
    """Both matrices are in the file, and NaN does not equal itself."""
    file = make("one") / "model.safetensors"
    state = load_file(file)
    edit_json(file.parent / "config.json", tie_word_embeddings=True)
    state["model.embed_tokens.weight"][3, 5] = math.nan
    for head in (state["model.embed_tokens.weight"].clone(), torch.zeros(401, 48)):
        save_file(state | {"lm_head.weight": head}, file)
        if head[3, 5].isnan():
            assert lf.load(file.parent).params.output[3, 5].isnan()
        else:
            refused(file.parent, r"duplicate: lm_head\.weight differs from model\.embed_tokens\.weight")


# --- headers


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (4,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("header, length", [
    (b"{}", 2**64 - 1), (b"{}", 2**63), (b"{}", 100_000_001), (b"{}", 99_999_999), (b"{}", 3), (b"{}", 0),
    (b"{", None), (b"[]", None), (b"\xff\xff", None), (b"[" * 10**5, None), (b'{"a": 5}', None),
    ({"a": entry(0, 16), "b": entry(8, 24)}, None), ({"a": entry(0, 16), "b": entry(24, 40)}, None),
    ({"a": entry(0, 16), "b": entry(0, 16)}, None), ({"a": entry(16, 0)}, None), ({"a": entry(0, 10**15)}, None),
    ({"a": entry(0, 16, shape=(10**12,))}, None), ({"a": entry(0, 16, shape=(2**32, 2**32))}, None),
    ({"a": entry(0, 16, shape=(-4,))}, None), ({"a": entry(0, 16, dtype="P8")}, None), ({"a": entry(8, 24)}, None),
], ids=lambda x: str(x)[:40])
def test_a_safetensors_header_that_lies_is_refused(make, header, length):
    folder = make("one")
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(header) if length is None else length) + header + bytes(40)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors: not a safetensors file, or a damaged one")


# --- tensors that are larger than their file


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("fake", [
    lambda x: torch.zeros(1).expand(x.shape), lambda x: torch.zeros(x.shape[1]).expand(x.shape),
    lambda x: torch.empty(x.shape, device="meta"), lambda x: x.to_sparse(),
    lambda x: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**9, 10**9), check_invariants=True),
    lambda x: torch.nested.nested_tensor([x, x]), lambda x: x.to(torch.complex64), list, lambda x: {"x": x},
], ids=["one number", "one row", "no number", "sparse", "huge and sparse", "nested", "complex", "list", "dictionary"])
def test_what_is_no_whole_tensor_is_refused(make, fake):
    file = make("meta") / "consolidated.00.pth"
    state = torch.load(file)
    torch.save(state | {"output.weight": fake(state["output.weight"])}, file)
    refused(file.parent, r"output\.weight in consolidated\.00\.pth: should be \[401, 48\], is (?!float)"
                         r"|consolidated\.00\.pth: .*sparse tensor")  # which torch 2.14 refuses itself


@pytest.mark.parametrize("shards", [1, 2])
def test_a_small_file_of_a_huge_model_is_refused(make, shards):
    """All shapes are right, but the file does not hold the numbers."""
    folder = make("meta")
    edit_json(folder / "params.json", dim=2**24, n_heads=2**16, n_kv_heads=2**16, vocab_size=2**30, multiple_of=2**30)
    config = lf.Config(2**24, 4, 2**16, 2**16, 2**30, 2**30)
    state = {}
    for path, weight in tree.paths(lf.abstract_params(config)).items():
        shape = list(flat_shape(weight))
        if len(shape) > 1:
            shape[path.split(".")[-1] in ("embedding", "wo", "w_down")] //= shards
        state[meta_name(path)] = torch.zeros(1).expand(shape)
    for i in range(shards):
        torch.save(state, folder / f"consolidated.{i:02d}.pth")
    assert sum(file.stat().st_size for file in folder.glob("*.pth")) < 100_000
    refused(folder, rf"{39 * shards} weights do not fit the settings")
