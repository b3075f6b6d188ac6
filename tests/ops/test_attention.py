"""The laws of the fused kernel: it computes what is written out, however it is mapped and differentiated, in one call.

All in float64, where the two differ by rounding alone: 1e-14 seen.
"""

import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vjp
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fn as lf
from llama_fn.model.attention import written_out
from llama_fn.ops import attend as attend_ops
from llama_fn.ops.aten import attend as aten
from llama_fn.ops.aten import sdpa_rules as sdpa
from llama_fn.ops.aten.attend import fused, one_query

attend = partial(attend_ops.attend, written_out)
K, G, T, H, S = 2, 3, 4, 6, 9  # key/value heads, query heads of each, queries, a head's width, slots
KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


def heads(key: torch.Tensor, *batch: int, slots: int = S, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Random queries, keys, values and positions."""
    keys = lf.random.split(key, 4)
    shapes = (*batch, K, G, T, H), (*batch, K, slots, H), (*batch, K, slots, H)
    numbers = [2 * lf.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False)]
    return [*numbers, lf.random.bits(keys[3], (*batch, T)) * slots >> 32]


def close(a, b, tolerance: float = 1e-12) -> bool:
    pairs = list(zip(lf.tree.leaves(a), lf.tree.leaves(b), strict=True))
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
    return all((x - y).abs().max() <= tolerance * max(1, y.abs().max()) for x, y in pairs)


def readout(kernel):
    """A scalar of all that the kernel returns, which no permutation leaves as it is."""
    def f(queries, keys, values, positions):
        out = kernel(queries, keys, values, positions)
        return (out.square() * torch.arange(1.0, out.numel() + 1).reshape(out.shape) / out.numel()).sum()
    return f


class Calls(TorchDispatchMode):
    """The first argument's shape of every call of the kernel, forward and backward."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.namespace == "llama_fn":  # an operator of this package is made of torch's
            with self:
                return f.decompose(*args)
        name = f.overloadpacket.__name__
        if name.startswith(KERNEL):
            (self.backward if name.endswith("backward") else self.forward).append(tuple(args[0].shape))
        return f(*args, **(kwargs or {}))


# --- it computes what is written out


@given(keys(), st.sampled_from([(), (5,), (5, 7)]), st.booleans())
def test_the_fused_kernel_computes_what_is_written_out(key, batch, cached):
    queries, k, v, positions = heads(key, *batch, slots=S if cached else T)
    positions = positions if cached else None
    assert close(fused(queries, k, v, positions), written_out(queries, k, v, positions))
    every = [grad(readout(kernel), (0, 1, 2))(queries, k, v, positions) for kernel in (fused, written_out)]
    assert close(*every)


@given(keys(), st.sampled_from([(), (5,), (5, 7)]), st.booleans(), st.integers(1, 9))
def test_in_blocks_it_computes_what_is_written_out(key, batch, cached, size):
    queries, k, v, _ = heads(key, *batch, slots=S if cached else T)
    first = lf.random.bits(key, (*batch, 1)) * (S - T + 1) >> 32
    positions = first + torch.arange(T) if cached else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten, "BLOCK", size)
        assert close(aten.in_blocks(queries, k, v, positions), written_out(queries, k, v, positions))


def test_many_queries_go_in_blocks_where_values_alone_are_asked_for(monkeypatch):
    monkeypatch.setattr(aten, "BLOCK", 2)
    args = heads(lf.random.key(3), 5, slots=S)

    def shapes(f, *args) -> list[tuple[int, ...]]:
        calls = Calls()
        with calls:
            f(*args)
        return calls.forward

    assert len(shapes(attend, *args)) == -(-T // 2)
    assert len(shapes(torch.vmap(attend), *args)) == 1
    assert len(shapes(attend, args[0].clone().requires_grad_(), *args[1:])) == 1
    assert len(shapes(attend, args[0][..., :2, :], *args[1:3], args[3][..., :2])) == 1
    monkeypatch.setattr(aten, "BLOCK", 3)  # at least a group, less than all queries
    assert args[0].shape[2] <= 3 < T and len(shapes(attend, *args)) == -(-T // 3)


def test_one_query_is_for_torchs_kernel_where_nothing_is_compiled():
    queries, k, v, positions = heads(lf.random.key(3), 5, slots=S)
    with Calls() as calls:
        attend(queries[..., -1:, :], k, v, positions[..., -1:])
    assert len(calls.forward) == 1


@given(keys(), st.sampled_from([(), (5,), (5, 7)]))
def test_one_query_computes_what_is_written_out(key, batch):
    queries, k, v, positions = heads(key, *batch, slots=S)
    queries, positions = queries[..., -1:, :], positions[..., -1:]
    assert close(one_query(queries, k, v, positions), written_out(queries, k, v, positions))


def axes_of_arguments(*axes: int) -> st.SearchStrategy[tuple[int | None, ...]]:
    """The axis of each of the four arguments that is mapped, or None; of one argument at least."""
    return st.tuples(*[st.sampled_from([None, *axes])] * 4).filter(lambda axes: axes != (None,) * 4)


def placed(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The mapped axis, which comes first, where it is to be; the first of all where nothing is mapped."""
    return x[0] if axis is None else x.movedim(0, axis)


@given(keys(), axes_of_arguments(0, 1, -1), st.integers(-5, 4), st.booleans())
def test_mapped_over_any_axis_of_any_argument_it_is_a_loop(key, in_dims, out_dim, inner):
    args = heads(key, 7, *(5,) * inner)
    mapped = torch.vmap(fused, in_dims, out_dim)(*map(placed, args, in_dims))
    rows = [[x[0 if axis is None else i] for x, axis in zip(args, in_dims, strict=True)] for i in range(7)]
    assert close(mapped, torch.stack([written_out(*row) for row in rows], out_dim))


@given(keys(), axes_of_arguments(0), axes_of_arguments(0), st.booleans())
def test_mapped_twice_it_is_two_loops(key, outer, inner, causal):
    args = heads(key, 5, 7, slots=T if causal else S)

    def attention_of(queries, k, v, positions, kernel=fused):
        return kernel(queries, k, v, None if causal else positions)

    def at(i, j):
        return [x[i if a == 0 else 0, j if b == 0 else 0] for x, a, b in zip(args, outer, inner, strict=True)]

    every = slice(None)
    mapped = torch.vmap(torch.vmap(attention_of, inner), outer)(*at(every, every))
    looped = [torch.stack([attention_of(*at(i, j), kernel=written_out) for j in range(7)]) for i in range(5)]
    assert close(mapped, torch.stack(looped))


DERIVATIVES = {
    "vmap(grad)": lambda f: torch.vmap(grad(readout(f), (0, 1, 2))),
    "vmap(grad), shared keys": lambda f: lambda q, k, v, p: torch.vmap(
        grad(readout(f), (0, 1, 2)), (0, None, 0, None))(q, k[0], v, p[0]),
    "vmap(grad), no positions": lambda f: lambda q, k, v, p: torch.vmap(
        grad(lambda q, k, v: readout(f)(q, k, v, None), (0, 1, 2)))(q, k[..., :T, :], v[..., :T, :]),
    "grad(vmap)": lambda f: grad(lambda *args: torch.vmap(readout(f))(*args).sum(), (0, 1, 2)),
    "grad(vmap), shared values": lambda f: lambda q, k, v, p: grad(
        lambda v: torch.vmap(readout(f), (0, 0, None, 0))(q, k, v, p).sum())(v[0]),
    "jacrev": lambda f: lambda q, k, v, p: jacrev(f, (0, 1, 2))(q[0], k[0], v[0], p[0]),
    "vmap(jacrev)": lambda f: torch.vmap(jacrev(f, 1)),
    "vmap(vmap(grad))": lambda f: lambda *args: torch.vmap(torch.vmap(grad(readout(f), (0, 1, 2)), (None, 0, 0, None)),
                                                           (0, None, None, 0))(*args),
    "vmap over cotangents": lambda f: lambda q, k, v, p: torch.vmap(
        lambda out: vjp(lambda q: f(q, k, v, p), q)[1](out))(q.expand(3, *q.shape)),
}


@pytest.mark.parametrize("name", DERIVATIVES)
@given(keys())
def test_first_derivatives_are_those_of_the_definition(name, key):
    args = heads(key, 5)
    assert close(DERIVATIVES[name](fused)(*args), DERIVATIVES[name](written_out)(*args), 1e-11)


# --- it runs once


@pytest.mark.parametrize("shared", [False, True])
def test_mapped_the_kernel_runs_once_and_so_does_its_backward(shared):
    args = heads(lf.random.key(0), 7, 5)
    in_dims = (0, None, None, 0) if shared else 0
    if shared:
        args[1:3] = args[1][0], args[2][0]
    with Calls() as calls, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's loop over the samples comes with one
        torch.vmap(attend, in_dims)(*args)
        assert (calls.forward, calls.backward) == ([(7 * 5, K * G, T, H)], [])
        torch.vmap(grad(readout(attend), (0, 1, 2)), in_dims)(*args)
        assert calls.forward[1:] == [(7 * 5, K * G, T, H)] and len(calls.backward) == 1
        torch.vmap(torch.vmap(attend))(*heads(lf.random.key(0), 7, 5))
        assert calls.forward[2:] == [(7 * 5, K * G, T, H)]


# --- beyond the first derivative


BEYOND = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "forward over reverse": lambda f, x, v: jvp(grad(f), (x,), (v,))[1],
    "reverse over forward": lambda f, x, v: grad(lambda x: jvp(f, (x,), (v,))[1])(x),
    "reverse over reverse": lambda f, x, v: vjp(grad(f), x)[1](v)[0],
    "hessian": lambda f, x, v: (hessian(f)(x).flatten(x.ndim) @ v.flatten()),
    "mapped jvp": lambda f, x, v: torch.vmap(lambda v: jvp(f, (x,), (v,))[1])(torch.stack([v, 2 * v]))[1] / 2,
    "mapped": lambda f, x, v: torch.vmap(lambda v: jvp(grad(f), (x,), (v,))[1])(torch.stack([v, 2 * v]))[1] / 2,
    "dual numbers": lambda f, x, v: tangent_of_dual_numbers(f, x, v),
}


def tangent_of_dual_numbers(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


@pytest.mark.parametrize("name", BEYOND)
@given(key=keys(), argument=st.integers(0, 2))
def test_beyond_first_derivatives_it_is_the_definition_and_exact(name, key, argument):
    args = heads(key)

    def f(x):
        return readout(attend)(*args[:argument], x, *args[argument + 1:])

    x, step = args[argument], 1e-5
    v = lf.random.normal(key, x.shape, x.dtype)
    with Calls() as calls:
        ours = BEYOND[name](f, x, v)
    assert not calls.forward
    first = f if ours.ndim == 0 else grad(f)
    assert close(ours, (first(x + step * v) - first(x - step * v)) / (2 * step), 1e-6)


# Derivatives of the kernel's own derivative: the forward has run before anybody knows of them.
OF_A_PULLBACK = {
    "vjp": lambda pull, u, v: vjp(pull, u)[1](v),
    "jvp": lambda pull, u, v: jvp(pull, (u,), (2 * u,))[1],
    "jacrev": lambda pull, u, v: jacrev(pull)(u),
    "vmap(vjp)": lambda pull, u, v: torch.vmap(lambda u: vjp(pull, u)[1](v))(torch.stack([u, 2 * u])),
    "vmap(jvp)": lambda pull, u, v: torch.vmap(lambda v: jvp(pull, (u,), (v,))[1])(torch.stack([u, 2 * u])),
    "nested": lambda pull, u, v: grad(lambda u: sum(x.sin().sum() for x in vjp(pull, u)[1](v)))(u),
    "twice": lambda pull, u, v: grad(lambda u: sum(x.sin().sum() for x in vjp(pull, u)[1](pull(u))))(u),
}


@pytest.mark.parametrize("name", OF_A_PULLBACK)
@given(key=keys(), placed=st.booleans(), batch=st.sampled_from([(), (5,)]))
def test_a_pullback_is_differentiated_as_the_definitions_is(name, key, placed, batch):
    *args, positions = heads(key, *batch, slots=S if placed else T)
    *v, _ = heads(lf.random.fold_in(key, 1), *batch, slots=S if placed else T)
    positions, u = positions if placed else None, v[0] + 1

    def derivative(kernel):
        return OF_A_PULLBACK[name](vjp(lambda *args: kernel(*args, positions), *args)[1], u, tuple(v))

    assert close(derivative(fused), derivative(written_out))


@given(key=keys(), argument=st.integers(0, 2))
def test_torch_func_and_plain_autograd_differentiate_the_kernel_thrice(key, argument):
    args = heads(key)
    x = args[argument].requires_grad_()

    def third(kernel):
        y = readout(kernel)(*args)
        for _ in range(2):
            y = torch.autograd.grad(y, x, create_graph=True)[0].sin().sum()
        return torch.autograd.grad(y, x)[0]

    def slope(f):
        return lambda x: grad(f)(x).sin().sum()

    def nested(x):
        return readout(fused)(*args[:argument], x, *args[argument + 1:])

    expected = third(written_out)
    tolerance = 1e-10  # a sine of some thousands is off by a rounding of those; 2e-12 seen
    assert close(third(fused), expected, tolerance)
    assert close(grad(slope(slope(nested)))(x.detach()), expected, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.005)])  # seen: 4e-7, 0.0015
def test_derivatives_of_a_pullback_in_a_narrow_dtype(dtype, tolerance):
    *args, positions = heads(lf.random.key(0), 5)
    *v, _ = heads(lf.random.key(1), 5)

    def derivative(kernel, dtype):
        xs, vs = (lf.tree.map(lambda x: x.bfloat16().to(dtype), tuple(part)) for part in (args, v))
        return vjp(vjp(lambda *xs: kernel(*xs, positions), *xs)[1], vs[0])[1](vs)[0]

    ours, exact = derivative(fused, dtype), derivative(written_out, torch.float64)
    assert ours.dtype == dtype and (ours - exact).norm() < tolerance * exact.norm()


def test_a_first_derivative_is_the_kernels_and_nothing_written_out(monkeypatch):
    monkeypatch.setattr(sdpa, "pullback", None)
    *args, positions = heads(lf.random.key(0), 7)
    with Calls() as calls:
        torch.vmap(grad(readout(attend), (0, 1, 2)))(*args, positions)
        torch.autograd.grad(readout(attend)(args[0].requires_grad_(), *args[1:], positions), args[0])
    assert len(calls.backward) == 2


def test_autocast_reaches_the_mapped_kernel():
    config = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70)
    params, tokens = lf.init_params(lf.random.key(0), config), torch.arange(15).reshape(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        mapped, _ = torch.vmap(lf.forward, (None, 0), (0, None))(params, tokens)
        batched, _ = lf.forward(params, tokens)
    assert mapped.dtype == batched.dtype == torch.bfloat16 and torch.equal(mapped, batched)
