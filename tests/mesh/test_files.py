"""The laws of files on a mesh: a process loads its parts alone, and what a mesh saves is the whole model."""

import math

import torch
from folders import same
from hypothesis import given
from hypothesis import strategies as st
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


@given(st.sampled_from(FORMATS), st.booleans(), st.sampled_from(MESHES), st.sampled_from([None, torch.bfloat16]))
def test_what_is_loaded_on_a_mesh_is_the_part_of_the_whole_bit_for_bit(tmp_path_factory, format, tied, mesh, dtype):
    folder, (format, shards), (plan, mesh) = tmp_path_factory.mktemp("model"), format, mesh
    lf.save(lf.Model(params(tied), None), folder, format=format, shards=shards)
    world(size_of(mesh))(loaded_is_the_part, folder, mesh, plan, dtype)
