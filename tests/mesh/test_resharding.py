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
from meshes import FEW, MESHES, fits, random_plans
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.tensor import DTensor, Replicate, Shard
from worlds import world

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint import snapshot
from llama_fn.checkpoint.sealed import sealed
from llama_fn.checkpoint.snapshot import load_snapshot, read_about, save_snapshot
from llama_fn.mesh.plan import PRESETS
from llama_fn.mesh.ranks import agreed, all_ranks
from llama_fn.mesh.sharded import is_sharded
from llama_fn.training.loop import TrainState, init_state
from llama_fn.training.record import MetricsFile
from llama_fn.training.saving import Saver
from llama_fn.training.snapshots import newest_snapshot

CONFIG = lf.Config(dim=96, n_layers=2, n_heads=12, n_kv_heads=4, vocab_size=36, hidden_dim=28, max_seq_len=32)
OPTIMIZERS = {"adamw": lf.optim.adamw(1e-3), "muon": lf.optim.muon(1e-3)}


@st.composite
def meshes_and_plans(draw):
    mesh = draw(st.sampled_from(MESHES))
    presets = [plan for plan in PRESETS.values() if fits(plan, mesh)]
    return mesh, draw(st.sampled_from(presets) | random_plans(mesh))


def state(seed: int = 0, optimizer: str = "adamw") -> TrainState:
    """The state of a run on one device, with numbers in all moments and in the counts."""
    params = lf.init_params(lf.random.key(seed), CONFIG, torch.bfloat16)
    fresh = init_state(params, OPTIMIZERS[optimizer])
    keys = iter(lf.random.split(lf.random.key(seed + 1), 99))
    filled = tree.map(lambda x: lf.random.normal(next(keys), x.shape).to(x.dtype) if x.is_floating_point()
                      else x + 7 + seed, fresh)
    return filled._replace(params=params)


def on_mesh(whole, mesh, plan):
    """This process's part of a state; the moments are divided as the parameters are."""
    return tree.map(lambda x: lf.mesh.shard(x, mesh, plan) if isinstance(x, lf.Params) else x, whole,
                    is_leaf=lambda x: isinstance(x, lf.Params))


def size_of(mesh: dict) -> int:
    return math.prod(mesh.values())


def saved(folder, mesh, plan):
    save_snapshot(on_mesh(state(), lf.mesh.make_mesh(mesh), plan), folder, {"step": 3})


def save_on(mesh, plan, folder) -> None:
    """Save the state from a mesh; from one process if the mesh has no axes."""
    if mesh:
        world(size_of(mesh))(saved, folder, mesh, plan)
    else:
        save_snapshot(state(), folder, {"step": 3})


def passed_on(source, target, mesh, plan, optimizer):
    """Load a snapshot onto a mesh, and save it from there."""
    fresh = lf.mesh.shard(tree.map(torch.zeros_like, state(0).params), lf.mesh.make_mesh(mesh), plan)
    found = load_snapshot(init_state(fresh, OPTIMIZERS[optimizer]), source)
    assert same(lf.mesh.unshard(found), state(0, optimizer)) and read_about(source) == {"step": 3}
    save_snapshot(found, target, {"step": 3})


@FEW
@given(meshes_and_plans(), meshes_and_plans(), st.sampled_from([*OPTIMIZERS]))
def test_a_snapshot_passes_from_mesh_to_mesh_bit_for_bit(tmp_path_factory, first, second, optimizer):
    """From one process to a mesh, to another mesh, and back to one process."""
    folder, whole = tmp_path_factory.mktemp("run"), state(0, optimizer)
    save_snapshot(whole, folder / "0", {"step": 3})
    for i, (mesh, plan) in enumerate((first, second)):
        world(size_of(mesh))(passed_on, folder / f"{i}", folder / f"{i + 1}", mesh, plan, optimizer)
    assert same(load_snapshot(tree.map(torch.zeros_like, whole), folder / "2"), whole)
    assert files(folder) == ["0", "1", "2"]


def files(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_every_number_is_written_once_and_every_process_writes_its_share(tmp_path):
    """The files of the first save are gone after the second."""
    whole = sum(x.nbytes for x in tree.leaves(state()))
    for plan, mesh in [("fsdp+tensor", {"dp": 2, "tp": 2}), ("replicated", {"dp": 2}), (None, {})]:
        save_on(mesh, plan, tmp_path / "snapshot")
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
    save_on({"dp": 2, "tp": 2}, "fsdp+tensor", tmp_path / "snapshot")
    world(2)(read_by_torch, tmp_path / "snapshot", {"tp": 2}, "tensor")


def loads_with(folder, mesh, plan, error, words):
    """Every process raises the same error, whichever of them has found it."""
    expected = on_mesh(state(), lf.mesh.make_mesh(mesh), plan)
    with pytest.raises(error, match=words):
        load_snapshot(expected, folder)


@FEW
@given(st.sampled_from(["flip", "cut", "missing"]), st.integers(1, 2), st.sampled_from([("fsdp", {"dp": 4}),
       ("tensor", {"tp": 2}), (None, {})]), st.data())
def test_a_damaged_file_of_one_process_is_an_error_of_all(tmp_path_factory, damage, rank, mesh, data):
    folder, (plan, mesh) = tmp_path_factory.mktemp("run") / "snapshot", mesh
    save_on({"dp": 2}, "fsdp", folder)
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
    save_on({"dp": 2}, "fsdp", tmp_path / "snapshot")
    manifest = tmp_path / "snapshot" / "manifest.json"
    kept = json.loads(manifest.read_text())
    other = {name: x for name, x in kept["leaves"].items() if name != "params.norm"} | {"more": kept["leaves"]["step"]}
    manifest.write_text(json.dumps(sealed({"leaves": other, "about": {}})))
    words = "2 leaves do not fit this run:\n  missing: params.norm\n  unknown: more"
    world(2)(loads_with, tmp_path / "snapshot", {"tp": 2}, "tensor", ValueError, words)
    parts = kept["leaves"]["params.norm"]["parts"]
    for wrong, words in [([parts[0], parts[1] | {"start": [92]}], "params.norm: 44 of its numbers are in no file"),
                         (parts[:1], "state-00002-of-00002.safetensors: damaged: it does not hold the leaves"),
                         ([parts[0] | {"file": "../run.json"}], "only such names are followed"),
                         ([{"file": "a"}], "manifest.json: not the manifest of a snapshot")]:
        leaves = kept["leaves"] | {"params.norm": kept["leaves"]["params.norm"] | {"parts": wrong}}
        manifest.write_text(json.dumps(sealed({"leaves": leaves, "about": {}})))
        with pytest.raises(ValueError, match=words):
            load_snapshot(state(), tmp_path / "snapshot")
    manifest.unlink()
    world(2)(loads_with, tmp_path / "snapshot", {"tp": 2}, "tensor", FileNotFoundError, "manifest.json: no such file")


def one_raises():
    def compute():
        if dist.get_rank() == 1:
            raise ValueError("only here")

    with pytest.raises(ValueError, match="only here"):
        agreed(compute, all_ranks())
    assert agreed(dist.get_rank, all_ranks()) == [0, 1]


def test_an_error_of_one_process_is_raised_by_all():
    world(2)(one_raises)


def fails_on(folder, failing):
    """One process cannot write, and all of them say so."""
    whole = on_mesh(state(1), lf.mesh.make_mesh({"dp": 2}), "fsdp")

    def before_write():
        if dist.get_rank() == failing:
            raise OSError(errno.ENOSPC, "No space left on device", "state")

    with pytest.raises(OSError, match="No space left"):
        save_snapshot(whole, folder, {"step": 9}, before_write)


def loses_its_file(folder):
    """The file of rank 1 is on a disk of its own."""
    whole = on_mesh(state(1), lf.mesh.make_mesh({"dp": 2}), "fsdp")
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(snapshot, "write_parts", lambda tensors, *_: dict.fromkeys(tensors, ""))
            patch.setattr(snapshot, "sync", lambda file: None)
        with pytest.raises(FileNotFoundError, match="state-00002-of-00002.*the processes must see one file system"):
            save_snapshot(whole, folder, {"step": 9})


def test_processes_that_do_not_see_one_file_system_are_told(tmp_path):
    save_on({"dp": 2}, "fsdp", tmp_path / "snapshot")
    before = contents(tmp_path)
    world(2)(loses_its_file, tmp_path / "snapshot")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_on_one_process_leaves_the_snapshot_before(tmp_path, failing):
    save_on({"dp": 2}, "fsdp", tmp_path / "snapshot")
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
