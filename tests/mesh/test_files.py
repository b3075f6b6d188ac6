"""The laws of files on a mesh: a process loads its parts alone, and what a mesh saves is the whole model."""

import gc
import math
import threading
from pathlib import Path

import pytest
import torch
from folders import contents, same
from hypothesis import example, given
from hypothesis import strategies as st
from meshes import FEW
from safetensors.torch import load_file
from worlds import world

import llama_fn as lf
from llama_fn import tree

CONFIG = lf.Config(dim=24, n_layers=2, n_heads=12, n_kv_heads=4, vocab_size=40, hidden_dim=64, max_seq_len=32)
MESHES = [("replicated", {"dp": 2}), ("fsdp", {"dp": 2}), ("tensor", {"tp": 2}), ("fsdp+tensor", {"dp": 2, "tp": 2}),
          ("tensor", {"tp": 4}), (None, {"dp": 4}), (None, {"dp": 2, "tp": 2}), ("tensor", {"dp": 2, "tp": 2}),
          ({"*b": "dp", "h": "tp", "f": "dp"}, {"dp": 2, "tp": 2}), ({"g": "tp", "d": "dp"}, {"dp": 2, "tp": 1})]
FORMATS = [("meta", None), ("meta", 2), ("meta", 4), ("hf", None), ("hf", 3), ("llama2c", None)]


def size_of(mesh: dict) -> int:
    return math.prod(mesh.values())


def params(tied: bool = False) -> lf.Params:
    whole = lf.init_params(lf.random.key(0), CONFIG)
    return whole._replace(output=whole.embedding) if tied else whole


def loaded_is_the_part(folder, mesh, plan, dtype):
    mesh = lf.mesh.make_mesh(mesh)
    whole = lf.load(folder, dtype=dtype).params
    plan_of_it = plan or {"dp": "fsdp", "tp": "tensor"}.get(",".join(mesh.mesh_dim_names), "fsdp+tensor")
    expected = lf.mesh.shard(whole, mesh, plan_of_it)
    found, tokenizer = lf.load(folder, mesh=mesh, plan=plan, dtype=dtype)
    assert same(found, expected) and tokenizer is None
    assert (found.output is found.embedding) == (whole.output is whole.embedding)
    for x in tree.leaves(found):
        assert x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes  # the process holds its part, and no more
    return sum(x.untyped_storage().nbytes() for x in {id(x): x for x in tree.leaves(found)}.values())


@FEW
@given(st.sampled_from([*FORMATS, ("bin", None)]), st.booleans(), st.sampled_from(MESHES),
       st.sampled_from([None, torch.bfloat16]))
@example(("meta", 4), False, ("fsdp+tensor", {"dp": 2, "tp": 2}), None)
@example(("hf", 3), True, ({"*b": "dp", "h": "tp", "f": "dp"}, {"dp": 2, "tp": 2}), None)
def test_what_is_loaded_on_a_mesh_is_the_part_of_the_whole_bit_for_bit(tmp_path_factory, format, tied, mesh, dtype):
    folder, (format, shards), (plan, mesh) = tmp_path_factory.mktemp("model"), format, mesh
    lf.save(lf.Model(params(tied), None), folder, format="hf" if format == "bin" else format, shards=shards)
    if format == "bin":  # the older files of Hugging Face's format are read, and not written
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    world(size_of(mesh))(loaded_is_the_part, folder, mesh, plan, dtype)


def saved_together(folder, mesh, plan, format, shards, tied, dtype):
    params_here = lf.mesh.shard(params(tied), lf.mesh.make_mesh(mesh), plan)
    lf.save(lf.Model(params_here, lf.load("stories").tokenizer), folder, format=format, shards=shards, dtype=dtype)


@FEW
@given(st.sampled_from(FORMATS), st.booleans(), st.sampled_from([mesh for mesh in MESHES if mesh[0]]),
       st.sampled_from([None, torch.bfloat16]))
@example(("hf", None), True, ("fsdp+tensor", {"dp": 2, "tp": 2}), None)
def test_what_a_mesh_saves_is_what_one_process_saves_byte_for_byte(tmp_path_factory, format, tied, mesh, dtype):
    folder, (format, shards), (plan, mesh) = tmp_path_factory.mktemp("model"), format, mesh
    lf.save(lf.Model(params(tied), lf.load("stories").tokenizer), folder / "alone", format=format, shards=shards,
            dtype=dtype)
    world(size_of(mesh))(saved_together, folder / "mesh", mesh, plan, format, shards, tied, dtype)
    assert contents(folder / "mesh") == contents(folder / "alone")


def fails_together(folder, error, words, **kwargs):
    part = lf.Model(lf.mesh.shard(params(), lf.mesh.make_mesh({"dp": 2}), "fsdp"), None)
    with pytest.raises(error, match=words):
        lf.save(part, folder, **kwargs)


def test_a_save_that_fails_is_an_error_of_every_process(tmp_path):
    (tmp_path / "file").write_text("")
    lf.save(lf.Model(params(), None), tmp_path / "model")
    before = contents(tmp_path)
    world(2)(fails_together, tmp_path / "model", ValueError, "a model in another format lies there", format="hf")
    world(2)(fails_together, tmp_path / "new", ValueError, "3 shards cannot be made", shards=3)
    world(2)(fails_together, tmp_path / "file", OSError, "file")
    assert contents(tmp_path) == before


def refused(folder, words, mesh, **kwargs):
    with pytest.raises(ValueError, match=words):
        lf.load(folder, mesh=lf.mesh.make_mesh(mesh), **kwargs)


def test_what_cannot_be_loaded_on_a_mesh_is_said(tmp_path):
    lf.save(lf.Model(lf.quantize(params(), "int8"), None), tmp_path)
    for folder, words, mesh, kwargs in [
            (tmp_path, "wq is quantized, and d is divided over dp", {"dp": 2}, {}),
            ("stories", "wq is quantized, and d is divided over dp", {"dp": 2}, {"quantize": "int4"}),
            ("stories", "has 2 numbers along k, and 4 devices", {"tp": 4}, {}),
            ("stories", "no preset has a mesh of the axes x", {"x": 2}, {})]:
        world(size_of(mesh))(refused, folder, words, mesh, **kwargs)
    with pytest.raises(ValueError, match="give the mesh, too"):
        lf.load("stories", plan="tensor")


def stories_on(mesh, plan):
    params, tokenizer = lf.load("stories", mesh=lf.mesh.make_mesh(mesh), plan=plan)
    whole = lf.load("stories").params
    assert same(params, lf.mesh.shard(whole, lf.mesh.make_mesh(mesh), plan))
    return tokenizer


@pytest.mark.parametrize(("plan", "mesh"), [("tensor", {"tp": 2}), ("fsdp", {"dp": 4})])
def test_the_embedded_model_is_loaded_on_a_mesh(plan, mesh):
    assert world(size_of(mesh))(stories_on, mesh, plan)[0] == lf.load("stories").tokenizer


def peak_while(compute):
    """The result, and by how much the process's own memory grew at most meanwhile; mapped pages are not its own."""
    def own() -> int:
        return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith("RssAnon"))

    gc.collect()
    before, peak, done = own(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], own())

    thread = threading.Thread(target=watch)
    thread.start()
    result = compute()
    peak[0] = max(peak[0], own())
    done.set()
    thread.join()
    return result, peak[0] - before


def memory_of(folder, mesh, plan, format):
    mesh = lf.mesh.make_mesh(mesh)
    lf.load(folder, mesh=mesh, plan=plan)  # modules and buffers of the first time
    loaded, peak = peak_while(lambda: lf.load(folder, mesh=mesh, plan=plan))
    return sum(x.nbytes for x in tree.leaves(loaded.params)), max(x.nbytes for x in tree.leaves(loaded.params)), peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's own memory")
@pytest.mark.parametrize(("plan", "mesh", "format", "shards"), [
    ("tensor", {"tp": 4}, "meta", 1), ("fsdp", {"dp": 4}, "meta", 4), ("tensor", {"tp": 4}, "hf", 1)])
def test_no_process_has_more_in_memory_than_its_parts_and_one_of_them_twice(tmp_path, plan, mesh, format, shards):
    config = lf.Config(dim=512, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=16384, hidden_dim=2048)
    whole = tree.map(lambda weight: torch.ones(weight.shape), lf.abstract_params(config))
    lf.save(lf.Model(whole, None), tmp_path, format=format, shards=shards)
    total = sum(x.nbytes for x in tree.leaves(whole))
    for own, largest, peak in world(4)(memory_of, tmp_path, mesh, plan, format):
        assert own <= 1.02 * total / 4
        assert peak <= own + largest + 2**23, (own, largest, peak)
