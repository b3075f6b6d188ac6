"""Quantized weights on a mesh: the part of the whole quantized weight, bit for bit."""

import pytest
import torch
from meshes import Case, Setting
from worlds import world

import llama_fn as lf

CONFIG = lf.Config(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, hidden_dim=256, max_seq_len=64)
TENSOR = Case(CONFIG, {"tp": 2}, "tensor")
ROWS = Case(CONFIG, {"dp": 2, "tp": 2}, "replicated+tensor")
LAWS = pytest.mark.parametrize(("case", "bits"), [(TENSOR, "int8"), (TENSOR, "int4"), (ROWS, "int8"), (ROWS, "int4")])


def same(ours, theirs) -> None:
    assert lf.tree.structure(ours) == lf.tree.structure(theirs)
    assert all(x.dtype == y.dtype and torch.equal(x, y)
               for x, y in zip(lf.tree.leaves(ours), lf.tree.leaves(theirs), strict=True))


def parts(case, bits):
    s = Setting(case, torch.float32)
    whole, own = lf.quantize(s.params, bits), lf.quantize(s.parts, bits)
    same(own, s.shard(whole))
    same(lf.mesh.unshard(own), whole)
    same(lf.dequantize(own), s.shard(lf.dequantize(whole)))
    assert {type(x.local) for x in own.blocks[0].attention} == {type(x) for x in whole.blocks[0].attention}


@LAWS
def test_parts_are_those_of_the_whole(case, bits):
    world(case.devices)(parts, case, bits)


def computed(case, bits):
    s = Setting(case, torch.float32)
    whole, own, rows = lf.quantize(s.params, bits), lf.quantize(s.parts, bits), s.shard(s.tokens)
    s.equal(lf.forward(own, rows)[0], s.shard(lf.forward(whole, s.tokens)[0]), atol=1e-4)
    adapter = lf.tree.map(lambda x: x + 0.1, lf.lora.init(lf.random.key(1), s.params, 3))

    def gradient(params, adapter, rows):
        return torch.func.grad(lambda adapter: lf.loss(lf.lora.apply(params, adapter), rows))(adapter)

    s.equal(gradient(own, s.shard(adapter), rows), gradient(whole, adapter, s.tokens), atol=1e-4)


@LAWS
def test_logits_and_the_gradient_of_an_adapter_are_those_of_one_device(case, bits):
    world(case.devices)(computed, case, bits)


def loaded(folder, stored, mesh, plan, bits):
    on, whole = lf.mesh.make_mesh(mesh), lf.load(stored).params
    same(lf.load(stored, mesh=on, plan=plan).params, lf.mesh.shard(whole, on, plan))
    same(lf.load(folder, mesh=on, plan=plan, quantize=bits).params, lf.mesh.shard(whole, on, plan))
    again = folder / f"again-{bits}"
    lf.save(lf.Model(lf.load(stored, mesh=on, plan=plan).params, None), again)
    same(lf.load(again).params, whole)


@LAWS
@pytest.mark.parametrize("tied", [False, True])
def test_files_give_the_same_parts_whether_they_hold_integers_or_not(case, bits, tied, tmp_path):
    params = lf.init_params(lf.random.key(0), CONFIG)
    params = params._replace(output=params.embedding) if tied else params
    lf.save(lf.Model(params, None), tmp_path / "plain", format="hf")  # which knows of tied weights
    lf.save(lf.Model(lf.quantize(params, bits), None), tmp_path / "stored")
    world(case.devices)(loaded, tmp_path / "plain", tmp_path / "stored", case.mesh, case.plan, bits)


def refused(case, small):
    s, few = Setting(case, torch.float32), Setting(small, torch.float32)
    for f in (lambda: lf.quantize(s.parts), lambda: s.shard(lf.quantize(s.params))):
        with pytest.raises(ValueError, match="wq is quantized, and d is divided over dp, .* choose the plan"):
            f()
    few.shard(lf.quantize(few.params))
    for f in (lambda: lf.quantize(few.parts, "int4"), lambda: few.shard(lf.quantize(few.params, "int4"))):
        with pytest.raises(ValueError, match="w_down has 96 inputs on each of 2 devices, .* 64 inputs share a scale"):
            f()


def test_a_plan_that_would_gather_integers_or_cut_a_group_is_refused():
    small = lf.Config(dim=128, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=40, hidden_dim=192, max_seq_len=64)
    world(2)(refused, Case(CONFIG, {"dp": 2}, "fsdp"), Case(small, {"tp": 2}, "tensor"))
