"""The train step compiled by its parts is the step, whatever it is made of."""

import functools
import warnings

import pytest
import torch
from strategies import random_params, token_rows

import llama_fn as lf
from llama_fn.compiled.differentiable import differentiable
from llama_fn.compiled.leafwise import leafwise
from llama_fn.training import chunked_loss, finetune, jit_step
from llama_fn.training.loss import loss_sum
from llama_fn.training.step import make_step

CONFIG = lf.Config(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70)


def times_axes(grads):
    return lf.tree.map(lambda g: g * g.ndim, grads)


WEIGHTS = torch.linspace(0.5, 1.5, 80)


def weighted(grads):
    """Each leaf times numbers that are no argument, are read for every leaf, and are added to some that are made."""
    return lf.tree.map(lambda g: g * (WEIGHTS[:g.shape[-1]] + torch.arange(g.shape[-1])), grads)


OPTIMIZERS = {
    "adamw": lf.optim.chain(lf.optim.clip_by_global_norm(0.5),
                            lf.optim.adamw(lf.optim.warmup_cosine(1e-2, 2, 9), mask=lf.optim.matrices)),
    "muon": lf.optim.chain(lf.optim.muon(1e-2), lf.optim.clip_by_global_norm(9.0)),
    "lion": lf.optim.lion(1e-2), "sgd": lf.optim.sgd(1e-2),
    "by-axes": lf.optim.chain(
        lf.optim.Optimizer(lambda params: (), lambda grads, state, params: (times_axes(grads), state)),
        lf.optim.sgd(1e-2)),
    "with-tensors": lf.optim.chain(lf.optim.sgd(torch.tensor(0.5)), lf.optim.Optimizer(
        lambda params: (), lambda grads, state, params: (weighted(grads), state)), lf.optim.adamw(
        lambda count: torch.where(count < 1, torch.tensor(1e-2), 3e-2))),
}


def copied(tree):
    return lf.tree.map(torch.clone, tree)


def steps(make, optimizer, count=3, segments=(), **options):
    """Parameters, optimizer state and metrics after some steps of two micro-batches."""
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    state, step, measured = (copied(params), optimizer.init(params)), make(optimizer, **options), []
    for i in range(count):
        tokens = token_rows(CONFIG, 2, 3, 9, seed=i)
        *state, metrics = step(*state, tokens, tokens % 4 > 0, *segments)
        measured.append(metrics)
    return *state, measured


def same(one, other, tolerance):
    assert lf.tree.structure(one) == lf.tree.structure(other)
    for a, b in zip(lf.tree.leaves(one), lf.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and (a - b).abs().max() <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_compiled_step_is_the_step(name):
    tolerance = {"lion": 6.1e-2}.get(name, 2e-3)  # where a gradient is about zero, its sign may be either
    same(steps(jit_step.jit_step, OPTIMIZERS[name]), steps(make_step, OPTIMIZERS[name]), tolerance)


@pytest.mark.slow
def test_so_it_is_with_segments_with_remat_in_chunks_and_in_another_dtype(monkeypatch):
    monkeypatch.setattr(chunked_loss, "LOGITS", 7 * 77)
    smooth = functools.partial(loss_sum, z_loss=1e-3, label_smoothing=0.1)  # the layers do not see it
    for options in ({"segments": [torch.arange(9).expand(2, 3, 9) // 4], "loss_sum": smooth},
                    {"layer": lf.remat(lf.block)}):
        same(steps(jit_step.jit_step, OPTIMIZERS["adamw"], **options),
             steps(make_step, OPTIMIZERS["adamw"], **options), 2e-3)
    *state, (half,) = steps(jit_step.jit_step, OPTIMIZERS["adamw"], 1, compute_dtype=torch.bfloat16)
    *_, (whole,) = steps(make_step, OPTIMIZERS["adamw"], 1)
    assert half.loss.dtype == torch.float32 and half.count == whole.count
    assert 0 < (half.loss - whole.loss).abs() < 0.02 * whole.loss
    assert 0 < (half.grad_norm - whole.grad_norm).abs() < 0.1 * whole.grad_norm
    assert {x.dtype for x in lf.tree.leaves(state)} == {torch.float32, torch.int64}


@pytest.mark.slow
def test_what_was_stopped_goes_on_bit_for_bit_and_takes_the_memory_of_what_was_donated():
    optimizer, params = OPTIMIZERS["adamw"], random_params(CONFIG, lf.random.key(0), torch.float32)
    tokens = token_rows(CONFIG, 1, 3, 9)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    step, state = jit_step.jit_step(optimizer), (params, optimizer.init(params))
    for i in range(4):
        if i == 2:
            kept = copied(state)
        *new, _ = step(*state, tokens, mask)
        assert all(a is b for a, b in zip(*map(lf.tree.leaves, (tuple(new), state)), strict=True))
        state = tuple(new)
    again = jit_step.jit_step(optimizer)
    for _ in range(2):
        *kept, _ = again(*kept, tokens, mask)
    assert all(map(torch.equal, lf.tree.leaves(tuple(kept)), lf.tree.leaves(state)))


@pytest.mark.slow
def test_layers_that_need_no_gradient_are_compiled_too():
    """Of preferences, the reference: once everything is compiled, no layer runs as it is."""
    calls, params = [], random_params(CONFIG, lf.random.key(0), torch.float32)

    @functools.wraps(lf.block)
    def layer(*args):
        calls.append(args)
        return lf.block(*args)

    task, tokens = finetune.full(params, 0.1), token_rows(CONFIG, 1, 3, 2, 9)
    step, state = finetune.step_of(task, OPTIMIZERS["sgd"], layer=layer, make=jit_step.jit_step), copied(params)
    opt_state = OPTIMIZERS["sgd"].init(state)
    for _ in range(2):
        before = len(calls)
        state, opt_state, _ = step(state, opt_state, tokens, tokens >= 0, task.frozen)
    assert len(calls) == before > 0


def test_master_weights_keep_their_dtype_and_what_is_small_is_not_lost():
    """A thousand updates of 2^-12 move a weight of one, which in bfloat16 none of them would."""
    params = lf.tree.map(torch.ones_like, random_params(CONFIG, lf.random.key(0), torch.float32))
    optimizer = lf.optim.adamw(2.0**-12, weight_decay=0)
    step, tokens = make_step(optimizer, compute_dtype=torch.bfloat16), token_rows(CONFIG, 1, 3, 9)
    new, _, metrics = step(params, optimizer.init(params), tokens, tokens >= 0)
    assert {x.dtype for x in lf.tree.leaves(new)} == {torch.float32}
    assert metrics.loss.dtype == torch.float32 and not torch.equal(new.output, params.output)
    assert new.output.bfloat16().equal(params.output.bfloat16())


def test_without_a_compiler_a_warning_says_so_and_the_step_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(jit_step, "obstacle", lambda: "there is no compiler")
    with pytest.warns(UserWarning, match="jit: there is no compiler. Until then a training step runs as it is, slower"):
        ours = steps(jit_step.jit_step, OPTIMIZERS["adamw"], 1)
    same(ours, steps(make_step, OPTIMIZERS["adamw"], 1), 0)


def test_what_is_mapped_or_not_differentiated_runs_as_it_is():
    calls = []

    def f(x):
        calls.append(type(x))
        return x.sin()

    x = torch.ones(3)
    g = differentiable(f)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(g(x), x.sin()) and torch.equal(torch.func.grad(lambda x: g(x).sum())(x), x.cos())
        assert torch.equal(torch.vmap(leafwise(f))(x), x.sin())
    assert len(calls) == 3
