"""Bytes: what the collectives of a step send is what `predict` says, to the byte."""

from math import prod

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from meshes import FEW, Case, cases
from strategies import token_rows
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import world

import llama_fn as lf
from llama_fn.mesh.plan import PRESETS, rows_over
from llama_fn.mesh.predict import Work, of_forward, of_gradient, of_norm, total
from llama_fn.mesh.traffic import sent
from llama_fn.training import chunked_loss
from llama_fn.training.jit_step import jit_step

CONFIG = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=40, hidden_dim=70)


def counted(case, work, logits, recomputed):
    """What a step sends: its gradient, the optimizer's update, and a forward."""
    mesh, (params, rows) = parts_of(case, work)
    optimizer, layer = lf.optim.adamw(1e-3), lf.remat(lf.block) if recomputed else lf.block
    state = optimizer.init(params)
    with pytest.MonkeyPatch.context() as patch, lf.mesh.counted(mesh) as gradient:
        patch.setattr(chunked_loss, "LOGITS", logits)
        grads, _ = torch.func.grad_and_value(lf.loss)(params, rows, layer=layer)
    with lf.mesh.counted(mesh) as update:
        lf.optim.apply_updates(params, optimizer.update(grads, state, params)[0])
    with lf.mesh.counted(mesh) as forward:
        lf.forward(params, rows)
    return gradient, update, forward


def parts_of(case, work):
    mesh = lf.mesh.make_mesh(case.mesh)
    whole = lf.init_params(lf.random.key(0), case.config, work.dtype), token_rows(case.config, work.rows, work.tokens)
    return mesh, lf.mesh.shard(whole, mesh, case.plan)


@FEW
@given(cases(), st.integers(2, 9), st.booleans(), st.booleans())
@example(Case(lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=40, hidden_dim=70), {"tp": 2},
              PRESETS["tensor"]), 5, False, True)
def test_a_step_sends_what_was_predicted(case, tokens, recomputed, in_chunks):
    work = Work(4, tokens, torch.float32)
    own = work.rows // prod(case.mesh[name] for name in rows_over(case.plan))
    in_chunks = in_chunks and own * (tokens - 1) > 2
    logits = 2 * case.config.vocab_size if in_chunks else 2**24
    gradient = of_gradient(case.config, case.mesh, case.plan, work, recomputed=recomputed, in_chunks=in_chunks)
    forward = of_forward(case.config, case.mesh, case.plan, work)
    seen = world(case.devices)(counted, case, work, logits, recomputed)
    assert seen == [(total(gradient), {}, total(forward))] * case.devices


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.seen.add(str(f))
        return f(*args, **(kwargs or {}))


def compiled(case, work, computed, recomputed, logits):
    """What a compiled training step sends, after it was compiled."""
    mesh, (params, rows) = parts_of(case, work)
    optimizer, mask = lf.optim.adamw(1e-3), torch.ones_like(rows, dtype=torch.bool)[None]
    step = jit_step(optimizer, lf.remat(lf.block) if recomputed else lf.block, compute_dtype=computed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "LOGITS", logits)
        params, state, _ = step(params, optimizer.init(params), rows[None], mask)
        with lf.mesh.counted(mesh) as traffic, Operators() as names:
            step(params, state, rows[None], mask)
    assert any("llama_fn.all_" in name for name in names.seen)
    assert not [name for name in names.seen if "c10d" in name]  # nothing that another one can overtake
    return traffic


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "mesh", "recomputed"), [("fsdp", {"dp": 2}, False), ("tensor", {"tp": 2}, True)])
def test_a_compiled_step_sends_what_was_predicted(plan, mesh, recomputed):
    """With the loss in chunks, as for a large vocabulary."""
    config = lf.Config(dim=48, n_layers=3, n_heads=12, n_kv_heads=4, vocab_size=40, hidden_dim=68)
    stored, work = Work(4, 9, torch.float32), Work(4, 9, torch.bfloat16)
    seen = world(2)(compiled, Case(config, mesh, PRESETS[plan]), stored, work.dtype, recomputed, 2 * config.vocab_size)
    gradient = of_gradient(config, mesh, plan, work, compiled=True, recomputed=recomputed, in_chunks=True)
    assert seen == [total(gradient + of_norm(config, mesh, plan))] * 2


def test_a_mesh_axis_of_one_device_sends_nothing():
    """A weight that is gathered from one device would be copied."""
    work = Work(4, 9, torch.float32)
    for of in (of_gradient, of_forward):
        assert of(CONFIG, {"dp": 1, "tp": 2}, "fsdp+tensor", work) == of(CONFIG, {"tp": 2}, "tensor", work)
        assert of(CONFIG, {"dp": 2, "tp": 1}, "fsdp+tensor", work) == of(CONFIG, {"dp": 2}, "fsdp", work)


def test_a_ring_passes_on_all_pieces_but_one():
    assert [sent(kind, 12, 4) for kind in ("all-reduce", "all-gather", "reduce-scatter")] == [18, 9, 9]
    assert sent("all-gather", 12, 1) == 0
