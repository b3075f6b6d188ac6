"""What torch lacks, and this package therefore does in a way of its own (see "Why not DTensor" in `mesh/README.md`).

Each test holds as long as torch lacks it. One that fails names what may go. Faults of gloo that come by chance are in
``tests/gloo_faults.py``.
"""

import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.nn.functional as differentiable
from meshes import Case, Setting
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.attention import SDPBackend, sdpa_kernel
from worlds import world

import llama_fn as lf
from llama_fn.training.jit_step import jit_step

CONFIG = lf.Config(dim=24, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=40, hidden_dim=28, max_seq_len=64)
HEADS = Case(CONFIG, {"tp": 2}, {"k": "tp"})
NO_DTENSOR = "leaves may be DTensors now: mesh/sharded.py, mesh/collectives.py"


def lacks(kind, words, what, f, *args):
    """`f(*args)` raises an error of this kind, with these words. If it does not, `what` may go."""
    try:
        f(*args)
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"torch has learnt it; {what}")


def as_dtensors(s):
    """The parameters with torch's own leaves in place of `Sharded`."""
    def leaf(x):
        names = [axis and axis.name for axis in x.sharding.over]
        placements = [Shard(names.index(name)) if name in names else Replicate()
                      for name in s.device_mesh.mesh_dim_names]
        return DTensor.from_local(x.local, s.device_mesh, placements)

    return lf.tree.map(leaf, s.parts, is_leaf=lambda x: isinstance(x, lf.mesh.Sharded))


def on_dtensors(case, transform):
    s = Setting(case)
    params, tokens = as_dtensors(s), s.tokens
    grad = torch.func.grad(lf.loss)
    with implicit_replication(), sdpa_kernel(SDPBackend.MATH):
        if transform == "grad":
            wq = grad(params, tokens).blocks[0].attention.wq.full_tensor()
            s.equal(wq, grad(s.params, tokens).blocks[0].attention.wq)
        elif transform == "jvp of grad":
            lacks(NotImplementedError, "does not have a sharding strategy registered", NO_DTENSOR,
                  lambda: torch.func.jvp(lambda p: grad(p, tokens), (params,), (params,)))
        elif transform == "grad of grad":
            lacks(RuntimeError, "The size of tensor a (6) must match the size of tensor b (3)", NO_DTENSOR,
                  torch.func.grad(lambda p: sum(x.square().sum() for x in lf.tree.leaves(grad(p, tokens)))), params)
        elif transform == "vmap over models":
            several = lf.tree.map(lambda x: torch.stack([x, x]), params)
            lacks(RuntimeError, "Sharding propagation failed for aten.view.default", NO_DTENSOR,
                  lambda: torch.vmap(lambda p: lf.forward(p, tokens)[0])(several))
        elif transform == "jit_step":
            optimizer = lf.optim.sgd(0.1)
            lacks(Exception, "DTensorSpec doesn't allow specify shard_order", NO_DTENSOR, jit_step(optimizer), params,
                  optimizer.init(params), tokens[None], torch.ones_like(tokens[None], dtype=torch.bool))


@pytest.mark.parametrize("transform", ["jvp of grad", "grad of grad", "vmap over models", "jit_step"])
def test_on_divided_heads_dtensors_have_no_rule_for(transform):
    world(2)(on_dtensors, HEADS, "grad")  # this they have, so the others do not fail for another reason
    world(2)(on_dtensors, HEADS, transform)


def divided_vocabulary(case):
    s = Setting(case)
    with implicit_replication():
        lacks(AssertionError, "", NO_DTENSOR, lf.loss, as_dtensors(s), s.tokens)


def test_dtensors_have_no_rule_for_a_divided_vocabulary_in_a_loss():
    world(2)(divided_vocabulary, HEADS._replace(plan={"v": "tp"}))


def collectives_under(transform):
    x, may_go = torch.arange(1.0, 4.0), "mesh/collectives.py may use torch's differentiable collectives"
    if transform == "vmap":
        lacks(RuntimeError, "it must override the setup_context", may_go, torch.vmap(differentiable.all_reduce), x)
    elif transform == "grad":
        lacks(RuntimeError, "it must override the setup_context", may_go,
              torch.func.grad(lambda x: differentiable.all_reduce(x).sum()), x)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_torchs_differentiable_collectives_have_no_rule_for(transform):
    world(2)(collectives_under, transform)


class Fivefold(torch.autograd.Function):
    """The same x, whose derivative is said to be 5."""

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return 5 * cotangent


def test_dynamo_drops_the_backward_of_a_function_under_torch_func():
    gradient = torch.func.grad(lambda x: Fivefold.apply(x).sum())
    assert gradient(torch.ones(3)).tolist() == [5, 5, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about its own code
        found = torch.compile(gradient, backend="aot_eager")(torch.ones(3))
    assert found.tolist() == [1, 1, 1], "torch has learnt it; `untraced` in private.py may go"


def test_the_metadata_of_torchs_checkpoints_is_a_pickle(tmp_path):
    """If it is not, the snapshots of a mesh may be written by `torch.distributed.checkpoint`."""
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"x": torch.zeros(3)}, checkpoint_id=tmp_path)
    with (tmp_path / ".metadata").open("rb") as file:
        assert type(pickle.load(file)).__name__ == "Metadata"
