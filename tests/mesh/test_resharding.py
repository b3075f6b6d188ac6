"""The laws of a mesh's snapshots: whole or not at all, bit for bit, on every other mesh and by every other plan."""

import os
from pathlib import Path

import pytest
import torch
from folders import bits, same
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.tensor import DTensor, Replicate, Shard
from worlds import world

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint.snapshot import load_snapshot, read_about, save_snapshot
from llama_fn.training.loop import TrainState, init_state
from llama_fn.training.muon import MuonState

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
    return torch.tensor([*mesh.values()] or [1]).prod().item()


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
