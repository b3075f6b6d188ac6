"""The laws of sharded leaves: on every mesh and by every plan, the results of one device."""

import pytest
import torch
from worlds import world

import llama_fn as lf

CONFIG = lf.Config(dim=24, n_layers=3, n_heads=12, n_kv_heads=4, vocab_size=40, hidden_dim=64, max_seq_len=32)
MESHES = [("replicated", {"dp": 2}), ("fsdp", {"dp": 2}), ("tensor", {"tp": 2}), ("fsdp+tensor", {"dp": 2, "tp": 2}),
          ("tensor", {"tp": 4}), ("fsdp", {"dp": 4})]


def logits_loss_gradient(mesh, plan):
    mesh = lf.mesh.make_mesh(mesh)
    params = lf.init_params(lf.random.key(0), CONFIG)
    tokens = lf.random.randint(lf.random.key(1), (4, 9), 0, CONFIG.vocab_size)
    parts, rows = lf.mesh.shard(params, mesh, plan), lf.mesh.shard(tokens, mesh, plan)
    expected = torch.func.grad_and_value(lf.loss)(params, tokens)
    grads, loss = torch.func.grad_and_value(lf.loss)(parts, rows)
    logits, _ = lf.forward(parts, rows)
    torch.testing.assert_close(logits, lf.mesh.shard(lf.forward(params, tokens)[0], mesh, plan), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lf.tree.leaves((lf.mesh.unshard(grads), loss)), lf.tree.leaves(expected), atol=1e-5,
                               rtol=1e-5)


@pytest.mark.parametrize(("plan", "mesh"), MESHES)
def test_logits_loss_and_gradient_are_those_of_one_device(plan, mesh):
    world(len(mesh) * 2 if len(mesh) > 1 else max(mesh.values()))(logits_loss_gradient, mesh, plan)
