"""The laws of a mesh's snapshots: whole or not at all, bit for bit, on every other mesh and by every other plan."""

import contextlib
import errno
import json
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from folders import bits, contents, same
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.tensor import DTensor, Replicate, Shard
from worlds import world

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint.sealed import sealed
from llama_fn.checkpoint.snapshot import load_snapshot, read_about, save_snapshot
from llama_fn.mesh.ranks import all_ranks
from llama_fn.mesh.sharded import is_sharded
from llama_fn.training.loop import TrainState, init_state
from llama_fn.training.muon import MuonState
from llama_fn.training.record import MetricsFile
from llama_fn.training.saving import Saver
from llama_fn.training.snapshots import newest_snapshot

CONFIG = lf.Config(dim=24, n_layers=2, n_heads=12, n_kv_heads=4, vocab_size=40, hidden_dim=64, max_seq_len=32)
MESHES = [("replicated", {"dp": 2}), ("fsdp", {"dp": 2}), ("tensor", {"tp": 2}), ("fsdp+tensor", {"dp": 2, "tp": 2}),
          ("tensor", {"tp": 4}), ("fsdp", {"dp": 4}), ("tensor", {"dp": 2, "tp": 2}),
          ({"*b": ("dp", "tp"), "h": "tp", "d": "dp"}, {"dp": 2, "tp": 1}), (None, {})]


def state(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> TrainState:
    """The state of a run on one device, with numbers in all moments and in the count."""
    params = lf.init_params(lf.random.key(seed), CONFIG, dtype)
    fresh = init_state(params, lf.optim.adamw(1e-3))
    keys = iter(lf.random.split(lf.random.key(seed + 1), 999))
    filled = tree.map(lambda x: lf.random.normal(next(keys), x.shape).to(x.dtype) if x.is_floating_point()
                      else x + 7 + seed, fresh)
    return filled._replace(params=params)


def on_mesh(whole, mesh, plan):
    """This process's part of a state; the moments are divided as the parameters are."""
    if plan is None:
        return whole
    return tree.map(lambda x: lf.mesh.shard(x, mesh, plan) if isinstance(x, lf.Params) else x, whole,
                    is_leaf=lambda x: isinstance(x, lf.Params))


def size_of(mesh: dict) -> int:
    return math.prod(mesh.values())


def saved(folder, mesh, plan, seed, about):
    save_snapshot(on_mesh(state(seed), lf.mesh.make_mesh(mesh), plan), folder, about)


def loaded_is_the_part(folder, mesh, plan, seed):
    expected = on_mesh(state(seed), lf.mesh.make_mesh(mesh), plan)
    found = load_snapshot(tree.map(torch.zeros_like, expected), folder)
    assert same(found, expected)
    assert read_about(folder) == {"step": 3}


def run(compute, folder, plan, mesh, *args):
    if plan is None:
        return {saved: lambda: save_snapshot(state(args[0]), folder, args[1]),
                loaded_is_the_part: lambda: loaded_alone(folder, *args)}[compute]()
    return world(size_of(mesh))(compute, folder, mesh, plan, *args)


def loaded_alone(folder, seed):
    assert same(load_snapshot(tree.map(torch.zeros_like, state(seed)), folder), state(seed))


@given(st.sampled_from(MESHES), st.sampled_from(MESHES), st.sampled_from(MESHES))
def test_a_snapshot_is_loaded_bit_for_bit_on_every_other_mesh(tmp_path_factory, first, second, third):
    folder = tmp_path_factory.mktemp("run") / "snapshot"
    run(saved, folder, *first, 0, {"step": 3})
    run(loaded_is_the_part, folder, *second, 0)
    run(loaded_is_the_part, folder, *third, 0)
    assert os.listdir(folder.parent) == ["snapshot"]


def files(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_every_number_is_written_once_and_every_process_writes_its_share(tmp_path):
    """The files of the first save are gone after the second."""
    whole = sum(x.nbytes for x in tree.leaves(state()))
    for plan, mesh in [("fsdp+tensor", {"dp": 2, "tp": 2}), ("replicated", {"dp": 2}), (None, {})]:
        run(saved, tmp_path / "snapshot", plan, mesh, 0, {"step": 3})
        count = size_of(mesh)
        names = [f"state-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [
            "state.safetensors"]
        assert files(tmp_path / "snapshot") == ["manifest.json", *names]
        sizes = [sum(x.nbytes for x in load_file(tmp_path / "snapshot" / name).values()) for name in names]
        assert sum(sizes) == whole and max(sizes) <= 1.1 * whole / count


def read_by_torch(folder, mesh, plan):
    """With torch's own reader and its own placements, as a program that does not know this package reads."""
    device_mesh = lf.mesh.make_mesh(mesh)
    expected = tree.paths(on_mesh(state(), device_mesh, plan), is_sharded)

    def placed(x):
        over = [axis and axis.name for axis in x.sharding.over]
        placements = [Shard(over.index(name)) if name in over else Replicate() for name in device_mesh.mesh_dim_names]
        return DTensor.from_local(torch.zeros_like(x.local), device_mesh, placements)

    found = {name: placed(x) if is_sharded(x) else torch.zeros_like(x) for name, x in expected.items() if
             not is_sharded(x) or x.local.ndim}
    load({name: x for name, x in found.items() if x.ndim}, storage_reader=HuggingFaceStorageReader(str(folder)))
    for name, x in found.items():
        if x.ndim:  # torch's reader fails on numbers without axes, such as the count of the steps
            assert bits(x.to_local()) == bits(expected[name].local), name


def test_torchs_own_reader_finds_the_same_parts(tmp_path):
    world(4)(saved, tmp_path / "snapshot", {"dp": 2, "tp": 2}, "fsdp+tensor", 0, {"step": 3})
    world(2)(read_by_torch, tmp_path / "snapshot", {"tp": 2}, "tensor")


def muon_state(mesh, plan):
    """The optimizer's state has the momentum of each hidden matrix by its path, in a dict."""
    params, moments = (lf.mesh.shard(state(seed).params, mesh, plan) for seed in (0, 5))
    leaves = tree.paths(moments, is_sharded)
    momentum = {path: x for path, x in leaves.items() if path.startswith("blocks") and "norm" not in path}
    others = {path: x for path, x in leaves.items() if path not in momentum}
    return TrainState(params, (MuonState(momentum, others), torch.tensor(4)), torch.tensor(4))


def muon_comes_back(folder):
    for first, second in [(("fsdp", {"dp": 4}), ("tensor", {"tp": 4})), (("tensor", {"tp": 4}), ("fsdp", {"dp": 4}))]:
        before, after = (muon_state(lf.mesh.make_mesh(mesh), plan) for plan, mesh in (first, second))
        save_snapshot(before, folder)
        assert same(load_snapshot(tree.map(torch.zeros_like, after), folder), after)


def test_muons_state_comes_back_by_another_plan(tmp_path):
    world(4)(muon_comes_back, tmp_path / "snapshot")


def loads_with(folder, mesh, plan, error, words):
    """Every process raises the same error, whichever of them has found it."""
    expected = on_mesh(state(), lf.mesh.make_mesh(mesh), plan)
    with pytest.raises(error, match=words):
        load_snapshot(expected, folder)


@given(st.sampled_from(["flip", "cut", "missing"]), st.integers(1, 2), st.sampled_from([("fsdp", {"dp": 4}),
       ("tensor", {"tp": 2}), (None, {})]), st.data())
def test_a_damaged_file_of_one_process_is_an_error_of_all(tmp_path_factory, damage, rank, mesh, data):
    folder, (plan, mesh) = tmp_path_factory.mktemp("run") / "snapshot", mesh
    run(saved, folder, "fsdp", {"dp": 2}, 0, {"step": 3})
    file = folder / f"state-{rank:05}-of-00002.safetensors"
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(begin, len(content) - 1))
    error, words = ValueError, r"snapshot: \d+ leaves do not fit this run:\n  .*: damaged, its digest differs"
    if damage == "flip":
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
    elif damage == "cut":
        file.write_bytes(content[:place])
        words = rf"{file.name}: not a safetensors file, or a damaged one"
    else:
        file.unlink()
        error, words = FileNotFoundError, f"{file.name}: no such file"
    if plan is None:
        with pytest.raises(error, match=words):
            load_snapshot(state(), folder)
    else:
        world(size_of(mesh))(loads_with, folder, mesh, plan, error, words)


def test_the_manifest_and_the_leaves_of_another_run_are_named(tmp_path):
    run(saved, tmp_path / "snapshot", "fsdp", {"dp": 2}, 0, {"step": 3})
    manifest = tmp_path / "snapshot" / "manifest.json"
    kept = json.loads(manifest.read_text())
    other = {name: x for name, x in kept["leaves"].items() if name != "params.norm"} | {"more": kept["leaves"]["step"]}
    manifest.write_text(json.dumps(sealed({"leaves": other, "about": {}})))
    words = "2 leaves do not fit this run:\n  missing: params.norm\n  unknown: more"
    world(2)(loads_with, tmp_path / "snapshot", {"tp": 2}, "tensor", ValueError, words)
    parts = kept["leaves"]["params.norm"]["parts"]
    for wrong, words in [([parts[0], parts[1] | {"start": [20]}], "params.norm: 8 of its numbers are in no file"),
                         (parts[:1], "state-00002-of-00002.safetensors: damaged: it does not hold the leaves"),
                         ([parts[0] | {"file": "../run.json"}], "only such names are followed"),
                         ([{"file": "a"}], "manifest.json: not the manifest of a snapshot")]:
        leaves = kept["leaves"] | {"params.norm": kept["leaves"]["params.norm"] | {"parts": wrong}}
        manifest.write_text(json.dumps(sealed({"leaves": leaves, "about": {}})))
        with pytest.raises(ValueError, match=words):
            load_snapshot(state(), tmp_path / "snapshot")
    manifest.unlink()
    world(2)(loads_with, tmp_path / "snapshot", {"tp": 2}, "tensor", FileNotFoundError, "manifest.json: no such file")


def fails_on(folder, failing):
    """One process cannot write, and all of them say so."""
    whole = on_mesh(state(1), lf.mesh.make_mesh({"dp": 2}), "fsdp")

    def before_write():
        if dist.get_rank() == failing:
            raise OSError(errno.ENOSPC, "No space left on device", "state")

    with pytest.raises(OSError, match="No space left"):
        save_snapshot(whole, folder, {"step": 9}, before_write)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_on_one_process_leaves_the_snapshot_before(tmp_path, failing):
    run(saved, tmp_path / "snapshot", "fsdp", {"dp": 2}, 0, {"step": 3})
    before = contents(tmp_path)
    world(2)(fails_on, tmp_path / "snapshot", failing)
    assert contents(tmp_path) == before
    world(2)(fails_on, tmp_path / "new" / "snapshot", failing)
    assert contents(tmp_path) == before


def trains(folder):
    """Snapshots are written in the background while the processes talk to each other."""
    first, mesh = dist.get_rank() == 0, lf.mesh.make_mesh({"dp": 2})
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(contextlib.closing(MetricsFile(folder / "metrics.jsonl", b""))) if first else None
        saver = stack.enter_context(Saver(folder, 2, all_ranks(apart=True)))
        for step in (1, 2, 2, 3):
            saver.save(on_mesh(state(step), mesh, "fsdp"), {"step": step}, metrics)
            for _ in range(20):
                dist.all_reduce(torch.ones(3))


def newest(folder, plan, mesh, step, skipped):
    expected = on_mesh(state(step), lf.mesh.make_mesh(mesh), plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, about = newest_snapshot(folder, tree.map(torch.zeros_like, expected), lambda about: None)
    assert same(found, expected) and about["step"] == step
    texts = [str(warning.message) for warning in caught]
    assert texts == [] or (dist.get_rank() == 0 and len(texts) == 1 and all(word in texts[0] for word in skipped))
    assert dist.get_rank() or bool(texts) == bool(skipped)


def test_the_newest_whole_snapshot_of_a_mesh_wins_and_the_skipped_ones_are_named(tmp_path):
    world(2)(trains, tmp_path)
    assert files(tmp_path / "snapshots") == ["step-00000002", "step-00000003"]
    world(4)(newest, tmp_path, "tensor", {"tp": 4}, 3, [])
    (tmp_path / "snapshots" / "step-00000003" / "state-00002-of-00002.safetensors").unlink()
    world(4)(newest, tmp_path, "tensor", {"tp": 4}, 2, ["step-00000003 (state-00002-of-00002.safetensors: no such"])
    world(2)(newest, tmp_path, "fsdp", {"dp": 2}, 2, ["step-00000003", "goes on from step 2"])
