"""Bytes: what the collectives of a step send is what `predict` says, to the byte."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import world

import llama_fn as lf
from llama_fn.mesh.plan import rows_over
from llama_fn.mesh.predict import Work, of_forward, of_gradient, total
from llama_fn.training import chunked_loss

PLANS = {
    2: [("replicated", {"dp": 2}), ("fsdp", {"dp": 2}), ("tensor", {"tp": 2}), ({"*b": "dp", "f": "dp"}, {"dp": 2}),
        ({"d": "x", "v": "x"}, {"x": 2})],
    4: [("fsdp+tensor", {"dp": 2, "tp": 2}), ("tensor", {"tp": 4}), ("fsdp", {"dp": 4}),
        ({"*b": ("dp", "tp"), "d": "dp", "f": "tp"}, {"dp": 2, "tp": 2}),
        ({"*b": "dp", "k": "tp", "f": "dp", "v": "tp"}, {"dp": 2, "tp": 2})],
}


@st.composite
def cases(draw):
    """A world, a plan and a mesh, a config that the plan can divide, and rows of tokens."""
    size = draw(st.sampled_from([2, 4]))
    plan, mesh = draw(st.sampled_from(PLANS[size]))
    k, g = draw(st.sampled_from([(4, 3), (8, 3), (4, 1)]))
    config = lf.Config(dim=k * g * draw(st.sampled_from([4, 6])), n_layers=draw(st.integers(1, 3)), n_heads=k * g,
                       n_kv_heads=k, vocab_size=4 * draw(st.integers(3, 20)), hidden_dim=4 * draw(st.integers(3, 20)))
    return size, plan, mesh, config, Work(4 * draw(st.integers(1, 2)), draw(st.integers(2, 9)), torch.float32)


def parts_of(config, mesh, plan, work):
    params = lf.init_params(lf.random.key(0), config, work.dtype)
    tokens = lf.random.randint(lf.random.key(1), (work.rows, work.tokens), 0, config.vocab_size)
    return lf.mesh.shard(params, mesh, plan), lf.mesh.shard(tokens, mesh, plan)


def counted(sizes, plan, config, work, logits, recomputed):
    """What a step sends: its forward, its gradient, the optimizer's update."""
    mesh = lf.mesh.make_mesh(sizes)
    params, rows = parts_of(config, mesh, plan, work)
    optimizer = lf.optim.adamw(1e-3)
    state = optimizer.init(params)
    layer = lf.remat(lf.block) if recomputed else lf.block
    with pytest.MonkeyPatch.context() as patch, lf.mesh.counted(mesh) as gradient:
        patch.setattr(chunked_loss, "LOGITS", logits)
        grads, _ = torch.func.grad_and_value(lf.loss)(params, rows, layer=layer)
    with lf.mesh.counted(mesh) as update:
        lf.optim.apply_updates(params, optimizer.update(grads, state, params)[0])
    with lf.mesh.counted(mesh) as forward:
        lf.forward(params, rows)
    return gradient, update, forward


@given(cases(), st.booleans(), st.booleans())
def test_a_step_sends_what_was_predicted(case, recomputed, in_chunks):
    size, plan, mesh, config, work = case
    own = work.rows
    for name in rows_over(lf.mesh.PRESETS[plan] if isinstance(plan, str) else plan):
        own //= mesh[name]
    tokens = own * (work.tokens - 1)
    logits, chunks = 2**24, 1
    if in_chunks and tokens > 2:
        logits, chunks = 2 * config.vocab_size, -(-tokens // 2)
    seen = world(size)(counted, mesh, plan, config, work, logits, recomputed)
    gradient = total(of_gradient(config, mesh, plan, work, recomputed=recomputed, chunks=chunks))
    assert seen == [(gradient, {}, total(of_forward(config, mesh, plan, work)))] * size
