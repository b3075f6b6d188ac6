"""Memory: a rank keeps its part of parameters, gradients and moments, and of the whole nothing."""

import gc

import pytest
import torch
from worlds import world

import llama_fn as lf
from llama_fn.private import is_wrapped
from llama_fn.training.step import make_step

CONFIG = lf.Config(dim=96, n_layers=2, n_heads=12, n_kv_heads=4, vocab_size=80, hidden_dim=256, max_seq_len=32)
MESHES = [("fsdp", {"dp": 2}), ("tensor", {"tp": 2}), ("fsdp", {"dp": 4}), ("tensor", {"tp": 4}),
          ("fsdp+tensor", {"dp": 2, "tp": 2})]


def live() -> dict[int, int]:
    """The bytes of each storage that a living tensor has, by its address."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.device.type == "cpu" and not is_wrapped(x)]
    storages = [x.untyped_storage() for x in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def resident(sizes, plan, stepped):
    """The bytes that stay when a tree was divided and its gradient taken, or two training steps run."""
    mesh, before = lf.mesh.make_mesh(sizes), live()
    params = lf.mesh.shard(lf.init_params(lf.random.key(0), CONFIG), mesh, plan)
    tokens = lf.random.randint(lf.random.key(1), (4, 9), 0, CONFIG.vocab_size)
    rows = lf.mesh.shard(tokens, mesh, plan)
    optimizer = lf.optim.adamw(1e-3)
    state = optimizer.init(params)
    grads = torch.func.grad(lf.loss)(params, rows)
    if stepped:
        for _ in range(2):
            step = make_step(optimizer)
            params, state, _ = step(params, state, rows[None], torch.ones_like(rows, dtype=torch.bool)[None])
    del tokens, rows
    after = live()
    kept = [sum(x.untyped_storage().nbytes() for x in lf.tree.leaves(part)) for part in (params, grads, state)]
    return sum(size for place, size in after.items() if before.get(place) != size), kept


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(("plan", "mesh"), MESHES)
def test_a_rank_keeps_its_part_of_parameters_gradients_and_moments(plan, mesh, stepped):
    ranks, whole = torch.Size(mesh.values()).numel(), 4 * CONFIG.n_params
    for everything, (params, grads, moments) in world(ranks)(resident, mesh, plan, stepped):
        assert params == grads == pytest.approx(whole / ranks, rel=0.1)
        assert moments == pytest.approx(2 * whole / ranks, rel=0.1)
        assert everything == pytest.approx(4 * whole / ranks, rel=0.1)
