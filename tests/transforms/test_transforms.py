"""Every transform works: the table of the README, eager and compiled, in float32 and bfloat16.

The eager values are held to independent ones, in float64: loops instead of `vmap`, `torch.autograd` over leaves that
require gradients instead of `torch.func`, and attention written out. The compiled values are held to the eager ones.
"""

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import settings
from strategies import random_params, token_rows
from torch import Tensor, vmap
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp
from torch.fx.experimental.proxy_tensor import make_fx

import llama_fn as lf
from llama_fn.model import attention

CONFIG = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=31, hidden_dim=70, max_seq_len=64)
M, B, T, S = 2, 3, 5, 11  # members of an ensemble, rows, tokens, slots


class World(NamedTuple):
    """What the transforms are tried on."""

    params: lf.Params
    ensemble: lf.Params  # M of them
    tokens: Tensor  # "B T"
    grid: Tensor  # "M B T"
    cache: lf.Cache  # of one row, 4 tokens long
    ragged: lf.Cache  # of B rows, each of its own length
    keys: Tensor  # B of them
    v: lf.Params  # a direction
    vs: lf.Params  # M directions


@functools.cache
def world(dtype: torch.dtype) -> World:
    """The same numbers in every dtype: bfloat16 can hold each."""
    members = [random_params(CONFIG, lf.random.key(seed)) for seed in range(M)]
    empty = [lf.init_cache(CONFIG, batch, max_len=S, dtype=torch.float64) for batch in ((), (B,))]
    cache, ragged = (lf.forward(members[0], token_rows(CONFIG, *old.length.shape, 4, seed=1), old)[1] for old in empty)
    directions = [random_params(CONFIG, lf.random.key(seed)) for seed in range(M, 2 * M)]
    exact = World(members[0], stacked(members), token_rows(CONFIG, B, T), token_rows(CONFIG, M, B, T, seed=2), cache,
                  ragged._replace(length=torch.tensor([2, 4, 1])), lf.random.split(lf.random.key(5), B),
                  directions[0], stacked(directions))
    return lf.tree.map(lambda x: x.bfloat16().to(dtype) if x.is_floating_point() else x, exact)


# --- the independent ones


def stacked(trees: list) -> Any:
    return lf.tree.map(lambda *xs: torch.stack(xs), *trees)


def loop(f: Callable, *trees: Any) -> Any:
    """`f` on the first of every tree, the second, and so on."""
    count = len(lf.tree.leaves(trees)[0])
    return stacked([f(*(lf.tree.map(lambda x: x[i], tree) for tree in trees)) for i in range(count)])  # noqa: B023


def leaf_gradients(y: Tensor, x: Any, **kwargs: Any) -> Any:
    leaves, structure = lf.tree.flatten(x)
    return lf.tree.unflatten(list(torch.autograd.grad(y, leaves, materialize_grads=True, **kwargs)), structure)


def gradient(f: Callable, x: Any, **kwargs: Any) -> Any:
    x = lf.tree.map(lambda leaf: leaf.detach().requires_grad_(), x)
    return leaf_gradients(f(x), x, **kwargs)


def jacobian(f: Callable, x: Any) -> Any:
    x = lf.tree.map(lambda leaf: leaf.detach().requires_grad_(), x)
    y = f(x)
    rows = stacked([leaf_gradients(entry, x, retain_graph=True) for entry in y.flatten()])
    return lf.tree.map(lambda row: row.unflatten(0, y.shape), rows)


def dot(a: Any, b: Any) -> Tensor:
    return sum((x * y).sum() for x, y in zip(lf.tree.leaves(a), lf.tree.leaves(b), strict=True))


def tangent(f: Callable, x: Any, v: Any) -> Tensor:
    """The derivative of f along v: that of u . J v, which is linear in u, by u."""
    x = lf.tree.map(lambda leaf: leaf.detach().requires_grad_(), x)
    y = f(x)
    u = torch.zeros_like(y, requires_grad=True)
    return torch.autograd.grad(dot(leaf_gradients(y, x, grad_outputs=u, create_graph=True), v), u)[0]


def curvature(f: Callable, x: Any, v: Any) -> Any:
    """The Hessian of f times v."""
    x = lf.tree.map(lambda leaf: leaf.detach().requires_grad_(), x)
    return leaf_gradients(dot(leaf_gradients(f(x), x, create_graph=True), v), x)


# --- the table: what a user writes, and what it is


def logits(params: lf.Params, tokens: Tensor, cache: lf.Cache | None = None) -> Tensor:
    return lf.forward(params, tokens, cache)[0]


def energy(params: lf.Params, tokens: Tensor, cache: lf.Cache) -> Tensor:
    """A scalar that the cache plays a part in."""
    return logits(params, tokens, cache).square().mean()


def from_nothing(params: lf.Params, tokens: Tensor) -> tuple[Tensor, lf.Cache]:
    return lf.forward(params, tokens, lf.init_cache(params.config, max_len=S, dtype=params.norm.dtype))


def with_norm(params: lf.Params, norm: Tensor) -> lf.Params:
    """With another weight of the first norm, small and far from the logits: attention lies between."""
    first, *rest = params.blocks
    return params._replace(blocks=(first._replace(attention_norm=norm), *rest))


def last(norm: Tensor, params: lf.Params, tokens: Tensor) -> Tensor:
    """The last logits, as a function of one leaf."""
    return logits(with_norm(params, norm), tokens)[-1]


def first_norm(w: World) -> Tensor:
    return w.params.blocks[0].attention_norm


def pullback_of_last(w: World) -> Callable[[Tensor], Tensor]:
    """The cotangent of a norm from that of the last logits. The forward does not see what will become of it."""
    pull = vjp(lambda norm: last(norm, w.params, w.tokens[0]), first_norm(w))[1]
    return lambda u: pull(u)[0]


VALUES = {
    "vmap over prompts": (
        lambda w: vmap(lf.forward, (None, 0), (0, None))(w.params, w.tokens)[0],
        lambda w: loop(lambda row: logits(w.params, row), w.tokens)),
    "vmap over prompts and their caches": (
        lambda w: vmap(lf.forward, (None, 0, 0))(w.params, w.tokens, w.ragged),
        lambda w: loop(lambda row, cache: lf.forward(w.params, row, cache), w.tokens, w.ragged)),
    "vmap over prompts, one cache": (
        lambda w: vmap(lf.forward, (None, 0, None))(w.params, w.tokens, w.cache),
        lambda w: loop(lambda row: lf.forward(w.params, row, w.cache), w.tokens)),
    "vmap over prompts, the cache made inside": (
        lambda w: vmap(from_nothing, (None, 0))(w.params, w.tokens),
        lambda w: loop(lambda row: from_nothing(w.params, row), w.tokens)),
    "vmap over lengths": (
        lambda w: vmap(lf.forward, (None, None, lf.Cache(None, None, 0)))(
            w.params, w.tokens[0], w.cache._replace(length=w.ragged.length)),
        lambda w: loop(lambda n: lf.forward(w.params, w.tokens[0], w.cache._replace(length=n)), w.ragged.length)),
    "vmap of vmap, one cache": (
        lambda w: vmap(vmap(lf.forward, (None, 0, None)), (None, 0, None))(w.params, w.grid, w.cache),
        lambda w: loop(lambda rows: loop(lambda row: lf.forward(w.params, row, w.cache), rows), w.grid)),
    "vmap over parameters": (
        lambda w: vmap(lf.forward, (0, None, None))(w.ensemble, w.tokens, w.ragged),
        lambda w: loop(lambda params: lf.forward(params, w.tokens, w.ragged), w.ensemble)),
    "vmap over parameters of vmap over prompts": (
        lambda w: vmap(vmap(logits, (None, 0)), (0, None))(w.ensemble, w.tokens),
        lambda w: loop(lambda params: loop(lambda row: logits(params, row), w.tokens), w.ensemble)),
}

FIRST = {
    "grad_and_value": (
        lambda w: grad_and_value(lf.loss)(w.params, w.tokens),
        lambda w: (gradient(lambda p: lf.loss(p, w.tokens), w.params), lf.loss(w.params, w.tokens))),
    "vjp": (
        lambda w: vjp(lambda p: logits(p, w.tokens[0]), w.params)[1](w.ensemble.output[0, :T, :CONFIG.vocab_size]),
        lambda w: gradient(lambda p: dot(logits(p, w.tokens[0]), w.ensemble.output[0, :T, :CONFIG.vocab_size]),
                           w.params)),
    "jacrev": (
        lambda w: jacrev(last)(first_norm(w), w.params, w.tokens[0]),
        lambda w: jacobian(lambda norm: last(norm, w.params, w.tokens[0]), first_norm(w))),
    "vmap(grad) over samples": (
        lambda w: vmap(grad(lf.loss), (None, 0))(w.params, w.tokens),
        lambda w: loop(lambda row: gradient(lambda p: lf.loss(p, row), w.params), w.tokens)),
    "vmap(grad) over parameters": (
        lambda w: vmap(grad(lf.loss), (0, None))(w.ensemble, w.tokens),
        lambda w: loop(lambda params: gradient(lambda p: lf.loss(p, w.tokens), params), w.ensemble)),
    "grad(vmap)": (
        lambda w: grad(lambda p: vmap(lf.loss, (None, 0))(p, w.tokens).square().sum())(w.params),
        lambda w: gradient(lambda p: sum(lf.loss(p, row).square() for row in w.tokens), w.params)),
    "grad by the cache": (
        lambda w: grad(lambda k, v: energy(w.params, w.tokens[0], w.cache._replace(k=k, v=v)), (0, 1))(
            w.cache.k, w.cache.v),
        lambda w: gradient(lambda kv: energy(w.params, w.tokens[0], w.cache._replace(k=kv[0], v=kv[1])), w.cache[:2])),
    "grad by a cache that rows share": (
        lambda w: grad(lambda k: vmap(energy, (None, 0, None))(w.params, w.tokens, w.cache._replace(k=k)).sum())(
            w.cache.k),
        lambda w: gradient(lambda k: sum(energy(w.params, row, w.cache._replace(k=k)) for row in w.tokens), w.cache.k)),
    "vmap(grad) by a cache that rows share": (
        lambda w: vmap(grad(lambda k, row: energy(w.params, row, w.cache._replace(k=k))), (None, 0))(
            w.cache.k, w.tokens),
        lambda w: loop(lambda row: gradient(lambda k: energy(w.params, row, w.cache._replace(k=k)), w.cache.k),
                       w.tokens)),
    "grad by the embedding": (
        lambda w: grad(lambda e: lf.loss(w.params._replace(embedding=e), w.tokens))(w.params.embedding),
        lambda w: gradient(lambda e: lf.loss(w.params._replace(embedding=e), w.tokens), w.params.embedding)),
    "grad by a block": (
        lambda w: grad(lambda b: lf.loss(w.params._replace(blocks=(b,)), w.tokens))(w.params.blocks[0]),
        lambda w: gradient(lambda b: lf.loss(w.params._replace(blocks=(b,)), w.tokens), w.params.blocks[0])),
}

BEYOND = {
    "jvp": (
        lambda w: jvp(lambda p: lf.loss(p, w.tokens), (w.params,), (w.v,)),
        lambda w: (lf.loss(w.params, w.tokens), tangent(lambda p: lf.loss(p, w.tokens), w.params, w.v))),
    "jvp, with a cache": (
        lambda w: jvp(lambda p: logits(p, w.tokens[0], w.cache), (w.params,), (w.v,))[1],
        lambda w: tangent(lambda p: logits(p, w.tokens[0], w.cache), w.params, w.v)),
    "jvp by the cache": (
        lambda w: jvp(lambda k: logits(w.params, w.tokens[0], w.cache._replace(k=k)), (w.cache.k,), (w.cache.v,))[1],
        lambda w: tangent(lambda k: logits(w.params, w.tokens[0], w.cache._replace(k=k)), w.cache.k, w.cache.v)),
    "linearize": (
        lambda w: linearize(lambda p: lf.loss(p, w.tokens), w.params)[1](w.v),
        lambda w: tangent(lambda p: lf.loss(p, w.tokens), w.params, w.v)),
    "jacfwd": (
        lambda w: jacfwd(last)(first_norm(w), w.params, w.tokens[0]),
        lambda w: jacobian(lambda norm: last(norm, w.params, w.tokens[0]), first_norm(w))),
    "vmap(jvp) over directions": (
        lambda w: vmap(lambda v: jvp(lambda p: lf.loss(p, w.tokens), (w.params,), (v,))[1])(w.vs),
        lambda w: loop(lambda v: tangent(lambda p: lf.loss(p, w.tokens), w.params, v), w.vs)),
    "jvp(vmap)": (
        lambda w: jvp(lambda p: vmap(lf.loss, (None, 0))(p, w.tokens), (w.params,), (w.v,))[1],
        lambda w: loop(lambda row: tangent(lambda p: lf.loss(p, row), w.params, w.v), w.tokens)),
    "forward over reverse": (
        lambda w: jvp(grad(lambda p: lf.loss(p, w.tokens)), (w.params,), (w.v,))[1],
        lambda w: curvature(lambda p: lf.loss(p, w.tokens), w.params, w.v)),
    "reverse over reverse": (
        lambda w: vjp(grad(lambda p: lf.loss(p, w.tokens)), w.params)[1](w.v)[0],
        lambda w: curvature(lambda p: lf.loss(p, w.tokens), w.params, w.v)),
    "reverse over forward": (
        lambda w: grad(lambda p: jvp(lambda p: lf.loss(p, w.tokens), (p,), (w.v,))[1])(w.params),
        lambda w: curvature(lambda p: lf.loss(p, w.tokens), w.params, w.v)),
    "forward over reverse, with a cache": (
        lambda w: jvp(grad(lambda p: energy(p, w.tokens[0], w.cache)), (w.params,), (w.v,))[1],
        lambda w: curvature(lambda p: energy(p, w.tokens[0], w.cache), w.params, w.v)),
    "forward over reverse by the cache": (
        lambda w: jvp(grad(lambda k: energy(w.params, w.tokens[0], w.cache._replace(k=k))), (w.cache.k,),
                      (w.cache.v,))[1],
        lambda w: curvature(lambda k: energy(w.params, w.tokens[0], w.cache._replace(k=k)), w.cache.k, w.cache.v)),
    "hessian": (
        lambda w: hessian(lambda norm: lf.loss(with_norm(w.params, norm), w.tokens))(first_norm(w)),
        lambda w: loop(lambda v: curvature(lambda norm: lf.loss(with_norm(w.params, norm), w.tokens), first_norm(w), v),
                       torch.eye(CONFIG.dim, dtype=w.params.norm.dtype))),
    "vjp of a pullback": (
        lambda w: vjp(pullback_of_last(w), w.v.norm[:CONFIG.vocab_size])[1](w.v.norm)[0],
        lambda w: tangent(lambda norm: last(norm, w.params, w.tokens[0]), first_norm(w), w.v.norm)),
    "jacrev of a pullback": (
        lambda w: jacrev(pullback_of_last(w))(w.v.norm[:CONFIG.vocab_size]).T,
        lambda w: jacobian(lambda norm: last(norm, w.params, w.tokens[0]), first_norm(w))),
    "jvp of a pullback": (
        lambda w: jvp(pullback_of_last(w), (w.v.norm[:CONFIG.vocab_size],), (w.v.norm[-CONFIG.vocab_size:],))[1],
        lambda w: gradient(lambda norm: dot(last(norm, w.params, w.tokens[0]), w.v.norm[-CONFIG.vocab_size:]),
                           first_norm(w))),
    "vmap of a pullback's vjp": (
        lambda w: vmap(lambda v: vjp(pullback_of_last(w), w.v.norm[:CONFIG.vocab_size])[1](v)[0])(w.vs.norm),
        lambda w: loop(lambda v: tangent(lambda norm: last(norm, w.params, w.tokens[0]), first_norm(w), v),
                       w.vs.norm)),
    "vmap(hvp) over directions": (
        lambda w: vmap(lambda v: vjp(grad(lambda p: lf.loss(p, w.tokens)), w.params)[1](v)[0])(w.vs),
        lambda w: loop(lambda v: curvature(lambda p: lf.loss(p, w.tokens), w.params, v), w.vs)),
    "vmap(hvp) over directions, forward over reverse": (
        lambda w: vmap(lambda v: jvp(grad(lambda p: lf.loss(p, w.tokens)), (w.params,), (v,))[1])(w.vs),
        lambda w: loop(lambda v: curvature(lambda p: lf.loss(p, w.tokens), w.params, v), w.vs)),
    "vmap(hvp) over samples": (
        lambda w: vmap(lambda row: vjp(grad(lambda p: lf.loss(p, row)), w.params)[1](w.v)[0])(w.tokens),
        lambda w: loop(lambda row: curvature(lambda p: lf.loss(p, row), w.params, w.v), w.tokens)),
    "vmap(hvp) over samples, forward over reverse": (
        lambda w: vmap(lambda row: jvp(grad(lambda p: lf.loss(p, row)), (w.params,), (w.v,))[1])(w.tokens),
        lambda w: loop(lambda row: curvature(lambda p: lf.loss(p, row), w.params, w.v), w.tokens)),
}

TABLE = VALUES | FIRST | BEYOND
REFUSED = {"linearize"}  # by torch.compile, of any function: see the end


# --- eager

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Of the norm of each leaf. Seen: 2e-15; 1.5e-6; 0.003; 0.023, some ten roundings to 8 bits (0.004) on the way through a
# layer and back twice.
TOLERANCE = {FLOAT64: 1e-12, FLOAT32: 2e-5, FLOAT16: 0.008, BFLOAT16: 0.06}


def difference(ours: Any, theirs: Any) -> float:
    """The largest of the leaves' relative differences; of integers none is allowed."""
    largest = 0.0
    for a, b in zip(lf.tree.leaves(ours), lf.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and (a.is_floating_point() or torch.equal(a, b))
        if a.is_floating_point():
            largest = max(largest, float((a.double() - b.double()).norm() / b.double().norm()))
    return largest


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "linearize"))
                                  for name in TABLE])  # linearize traces: 8 s
def test_eager_transforms_are_loops_and_plain_gradients(name):
    transform, independent = TABLE[name]
    with mock.patch.object(attention, "attend", lambda definition, *args: definition(*args)):
        expected = independent(world(FLOAT64))
    for dtype, tolerance in TOLERANCE.items():
        ours = transform(world(dtype))
        assert difference(ours, expected) < tolerance, dtype


def decode_step(params: lf.Params, token: Tensor, cache: lf.Cache, key: Tensor) -> tuple[Tensor, lf.Cache]:
    logits, cache = lf.forward(params, token[None], cache)
    return lf.sampler(temperature=0.8, top_k=7)(key, logits[-1]), cache


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_decode_step_maps_over_keys_and_over_rows(dtype):
    w = world(dtype)
    keys = lf.random.split(w.keys[0], 64)
    draws, _ = vmap(decode_step, (None, None, None, 0))(w.params, w.tokens[0, 0], w.cache, keys)
    each = [decode_step(w.params, w.tokens[0, 0], w.cache, key)[0] for key in lf.random.split(w.keys[0], 64)]
    assert draws.tolist() == [int(draw) for draw in each] and len(set(draws.tolist())) > 3
    rows, caches = vmap(decode_step, (None, 0, 0, 0))(w.params, w.tokens[:, 0], w.ragged, w.keys)
    expected, after = loop(lambda *row: decode_step(w.params, *row), w.tokens[:, 0], w.ragged, w.keys)
    assert torch.equal(rows, expected) and difference(caches, after) < TOLERANCE[dtype]


def test_vmap_takes_its_own_options():
    w = world(FLOAT64)
    expected = loop(lambda row: logits(w.params, row), w.tokens)
    for options in ({"chunk_size": 2}, {"randomness": "different"}, {"out_dims": 1}, {"out_dims": -1}):
        mapped = vmap(lambda row: logits(w.params, row), **options)(w.tokens)
        assert difference(mapped.movedim(options.get("out_dims", 0), 0), expected) < 1e-12
    assert difference(vmap(lambda row: logits(w.params, row), 1)(w.tokens.T), expected) < 1e-12
    some = lf.tree.map(lambda x: None, w.params)._replace(embedding=0)  # in_dims as a tree: one weight is mapped
    members = vmap(logits, (some, None))(w.params._replace(embedding=w.ensemble.embedding), w.tokens)
    assert difference(members, loop(lambda e: logits(w.params._replace(embedding=e), w.tokens),
                                    w.ensemble.embedding)) < 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", BFLOAT16)])
def test_transforms_work_in_every_mode(mode):
    w = world(FLOAT32)
    names = ["vmap over prompts and their caches", "vmap(grad) over samples", "jvp", "forward over reverse"]
    with mode():
        inside = [TABLE[name][0](w) for name in names]
    for name, ours in zip(names, inside, strict=True):
        tolerance = FLOAT32 if mode in (torch.no_grad, torch.inference_mode) else BFLOAT16
        assert difference(ours, TABLE[name][0](w)) < TOLERANCE[tolerance], name


def test_weights_that_require_gradients_have_them_as_ever():
    w = world(FLOAT64)
    leaves = lf.tree.map(lambda x: x.clone().requires_grad_(), w.params)
    lf.loss(leaves, w.tokens).backward()
    expected = grad(lf.loss)(w.params, w.tokens)
    assert difference(lf.tree.map(lambda x: x.grad, leaves), expected) < 1e-12
    assert difference(lf.tree.map(Tensor.detach, grad(lf.loss)(leaves, w.tokens)), expected) < 1e-12


@pytest.mark.slow
def test_a_graph_is_traced_without_reading_numbers():
    w = world(FLOAT32)
    expected = lf.forward(w.params, w.tokens, w.ragged)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda *args: lf.forward(*args), tracing_mode=mode)(w.params, w.tokens, w.ragged)
        assert difference(graph(w.params, w.tokens, w.ragged), expected) < TOLERANCE[FLOAT32]
    with FakeTensorMode() as fake:
        imagined, _ = lf.forward(*lf.tree.map(fake.from_tensor, (w.params, w.tokens, w.ragged)))
    assert imagined.shape == expected[0].shape


def test_plain_autograd_differentiates_again_and_again():
    w = world(FLOAT64)
    x, v = first_norm(w), w.v.norm

    def f(norm: Tensor) -> Tensor:
        return lf.loss(with_norm(w.params, norm), w.tokens)

    def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        first, = torch.autograd.grad(f(x), x, create_graph=True)
        second, = torch.autograd.grad(dot(first, v), x, create_graph=True)
        return second.detach(), torch.autograd.grad(dot(second, v), x)[0]

    second, third = slopes(x)
    assert difference(second, jvp(grad(f), (x,), (v,))[1]) < 1e-12
    assert difference(third, grad(lambda x: dot(jvp(grad(f), (x,), (v,))[1], v))(x)) < 1e-12
    with forward_ad.dual_level():  # forward mode over what plain autograd does
        dual = forward_ad.make_dual(x.detach().requires_grad_(), v)
        first, = torch.autograd.grad(f(dual), dual, create_graph=True)
        assert difference(forward_ad.unpack_dual(first).tangent.detach(), second) < 1e-12


# --- compiled: each line alone and in both dtypes with `--hypothesis-profile deep`, in an hour; else some, together

SOME = {
    FLOAT32: [
        ("vmap over prompts and their caches", "vmap over prompts, the cache made inside"),
        ("forward over reverse, with a cache", "jvp of a pullback"),
    ],
    BFLOAT16: [
        ("vmap over parameters of vmap over prompts", "vmap(grad) over samples", "jacrev",
         "grad by a cache that rows share"),
    ],
}
EVERY = {dtype: [(name,) for name in TABLE if name not in REFUSED] for dtype in (FLOAT32, BFLOAT16)}
CHOSEN = EVERY if settings.get_current_profile_name() == "deep" else SOME


@pytest.mark.slow
@pytest.mark.parametrize("dtype, names", [(dtype, names) for dtype in CHOSEN for names in CHOSEN[dtype]],
                         ids=lambda value: str(value).removeprefix("torch."))
def test_compiled_equals_eager(dtype, names):
    torch._dynamo.reset()

    def transforms(w: World) -> list:
        return [TABLE[name][0](w) for name in names]

    compiled = torch.compile(transforms, fullgraph=True)(world(dtype))
    for name, ours, eager in zip(names, compiled, transforms(world(dtype)), strict=True):
        assert difference(ours, eager) < TOLERANCE[dtype], name


@pytest.mark.slow
def test_no_graph_holds_the_zeros_that_inductor_crashes_on():
    graphs = []

    def look(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    transform, _ = TABLE["reverse over forward"]
    compiled = torch.compile(transform, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    assert difference(compiled(world(FLOAT32)), transform(world(FLOAT32))) < TOLERANCE[FLOAT32]
    assert len(graphs) == 1 and "zerotensor" not in graphs[0]


@pytest.mark.slow
def test_what_torch_does_for_no_function():
    torch._dynamo.reset()
    x, one = torch.arange(3.0), torch.ones(())
    with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::_make_dual"):
        vmap(lambda x: linearize(torch.sin, x)[1](one))(x)
    assert not torch.allclose(grad(lambda x: linearize(torch.sin, x)[1](one))(one), -one.sin())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disallow_in_graph"):
        torch.compile(lambda x: linearize(torch.sin, x)[1](x), fullgraph=True)(torch.ones(2))


@pytest.mark.slow
def test_torchs_own_warnings_stay_unsaid():
    program = """
import torch, llama_fn as lf
from torch.func import jacrev, jvp, linearize
params = lf.init_params(lf.random.key(0), lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=31,
                                                    hidden_dim=70))
loss = lambda params: lf.loss(params, torch.arange(7))
_, tangent = jvp(loss, (params,), (params,))
assert torch.allclose(linearize(loss, params)[1](params), tangent)
torch.compile(jacrev(torch.sin), fullgraph=True)(torch.ones(3))
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stdout and not run.stderr, run.stderr
