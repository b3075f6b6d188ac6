"""The examples of second derivatives, against the matrices themselves, which plain autograd makes column by column."""

import math
import re
from unittest import mock

import example
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import keys, random_params, token_rows
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import llama_fn as lf
from llama_fn.model import attention

top_eigenpair = example.functions("hessian_eigenvalue").top_eigenpair
hessian_trace = example.functions("hessian_trace").hessian_trace
gauss_newton_vector = example.functions("gauss_newton").gauss_newton_vector

# k = 2, g = 3, h = 4, d = 24, f = 7, v = 11
CONFIG = lf.Config(dim=24, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=11, hidden_dim=7, max_seq_len=64)
TOKENS = token_rows(CONFIG, 3, 6)


def tiny(key: Tensor) -> tuple[lf.Params, dict]:
    """A model, and 48 of its numbers in two leaves, one before attention and one in which the logits are linear."""
    params = random_params(CONFIG, key)
    return params, {"inner": params.blocks[0].attention_norm, "outer": params.norm}


def with_part(params: lf.Params, part: dict) -> lf.Params:
    (block,) = params.blocks
    return params._replace(blocks=(block._replace(attention_norm=part["inner"]),), norm=part["outer"])


def flat(value) -> Tensor:
    return torch.cat([x.flatten() for x in lf.tree.leaves(value)])


def unflat(x: Tensor, like):
    leaves, structure = lf.tree.flatten(like)
    pieces = x.split([leaf.numel() for leaf in leaves])
    return lf.tree.unflatten([piece.view(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)], structure)


def written_out():
    return mock.patch.object(attention, "attend", lambda definition, *args: definition(*args))


def explicit(f, at) -> Tensor:
    """The Hessian of f as a matrix, where attention is its definition."""
    with written_out():
        return hessian(lambda x: f(unflat(x, at)), flat(at))


def quadratic(matrix: Tensor):
    """A function of two leaves with this Hessian, and a point."""
    n = len(matrix)
    return (lambda p: flat(p) @ matrix @ flat(p) / 2), {"a": torch.ones(2, dtype=matrix.dtype),
                                                         "b": (torch.ones(n - 2, dtype=matrix.dtype),)}


def symmetric(key: Tensor, n: int) -> Tensor:
    x = lf.random.normal(key, (n, n), torch.float64)
    return x + x.T


@pytest.mark.parametrize("seed", [10, 16, 19])  # of 16, it is negative
def test_the_top_eigenpair_is_that_of_the_explicit_hessian(seed):
    params, part = tiny(lf.random.key(seed))

    def f(part):
        return lf.loss(with_part(params, part), TOKENS)

    matrix = explicit(f, part)
    values = torch.linalg.eigvalsh(matrix)
    second, first = values[values.abs().argsort()][-2:]
    steps = math.ceil(math.log(1e-7) / math.log(abs(second / first)))  # the vector's error shrinks by that a step
    assert steps < 100, "choose another seed"
    value, vector = top_eigenpair(f, part, lf.random.like(lf.random.key(9), part), steps)
    assert value == pytest.approx(float(first), abs=1e-9)
    assert (matrix @ flat(vector) - value * flat(vector)).norm() < 1e-5
    assert float(flat(vector).norm()) == pytest.approx(1)


@given(keys(), st.integers(3, 7), st.booleans())
@settings(max_examples=5)
def test_the_top_eigenvalue_is_farthest_from_zero_not_largest(key, n, negative):
    basis, _ = torch.linalg.qr(symmetric(key, n))
    values = torch.linspace(-1, 1, n, dtype=torch.float64)
    values[n // 2] = extreme = -3.0 if negative else 3.0
    f, at = quadratic(basis @ torch.diag(values) @ basis.T)
    value, _ = top_eigenpair(f, at, lf.random.like(key, at), 20)
    assert value == pytest.approx(extreme)


@pytest.mark.parametrize("draw", [lf.random.rademacher, lf.random.normal])
@given(keys())
@settings(max_examples=3)
def test_the_trace_is_the_mean_of_the_probes_one_by_one(draw, key):
    params, part = tiny(key)

    def f(part):
        return lf.loss(with_part(params, part), TOKENS)

    matrix, many = explicit(f, part), lf.random.split(key, 5)
    samples = torch.stack([v @ matrix @ v for v in (flat(lf.random.like(key, part, draw)) for key in many)])
    mean, error = hessian_trace(f, part, many, draw)
    assert mean == pytest.approx(float(samples.mean()), abs=1e-9)
    assert error == pytest.approx(float((samples - samples.mean()).square().sum() / 4 / 5) ** 0.5, abs=1e-9)


@given(keys())
def test_signs_as_probes_are_exact_on_a_diagonal(key):
    diagonal = lf.random.normal(key, (7,), torch.float64)
    mean, error = hessian_trace(*quadratic(torch.diag(diagonal)), lf.random.split(key, 2))
    assert mean == pytest.approx(float(diagonal.sum())) and error < 1e-9


@given(keys())
def test_probes_spread_as_the_formula_says_and_signs_less(key):
    matrix, n = symmetric(key, 6), 4096
    off_diagonal = matrix - matrix.diagonal().diag()
    for draw, norm in ((lf.random.rademacher, off_diagonal.norm()), (lf.random.normal, matrix.norm())):
        mean, error = hessian_trace(*quadratic(matrix), lf.random.split(key, n), draw)
        assert error == pytest.approx(float(norm * (2 / n) ** 0.5), rel=0.15)
        assert abs(mean - matrix.trace()) < 5 * error


@given(keys())
@settings(max_examples=5)
def test_the_gauss_newton_product_is_that_of_the_matrices(key):
    params, part = tiny(key)

    def logits(part):
        return lf.forward(with_part(params, part), TOKENS[:, :-1])[0]

    v = lf.random.like(key, part)
    product = gauss_newton_vector(logits, nats, part, v)
    with written_out():
        slope = jacobian(lambda x: logits(unflat(x, part)).flatten(), flat(part))
    matrix = slope.T @ hessian(lambda z: nats(z.view(3, 5, -1)), logits(part).flatten()) @ slope
    assert lf.tree.structure(product) == lf.tree.structure(part)
    assert (matrix @ flat(v) - flat(product)).abs().max() < 1e-9
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-9


@given(keys())
@settings(max_examples=3)
def test_gauss_newton_is_the_hessian_where_the_logits_are_linear_and_there_alone(key):
    params, _ = tiny(key)
    for name, linear in (("output", True), ("norm", True), ("embedding", False)):
        weight = getattr(params, name)

        def logits(w):
            return lf.forward(params._replace(**{name: w}), TOKENS[:, :-1])[0]  # noqa: B023, called at once

        v = lf.random.like(key, weight)
        hv = torch.func.jvp(torch.func.grad(lambda w: nats(logits(w))), (weight,), (v,))[1]
        apart = (gauss_newton_vector(logits, nats, weight, v) - hv).abs().max()
        assert (apart < 1e-9) == linear and hv.abs().max() > 1e-4


def nats(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.slow
def test_the_examples_of_curvature_run(capsys):
    out = example.run("hessian_eigenvalue", capsys)
    value, rate = (float(x) for x in re.search(r"eigenvalue ([\d.]+): .* rate of ([\d.]+)", out).groups())
    assert value * rate == pytest.approx(2, rel=1e-2) and "lies in output" in out
    out = example.run("hessian_trace", capsys)
    signs, error, normal, other = (float(x) for pair in re.findall(r"([\d.]+) \+- ([\d.]+)", out) for x in pair)
    assert 0 < error < other and abs(signs - normal) < 4 * other
    out = example.run("gauss_newton", capsys)
    pairs = [tuple(map(float, pair)) for pair in re.findall(r"G v = +(-?[\d.]+) +v . H v = +(-?[\d.]+)", out)]
    assert [g == pytest.approx(h, rel=2e-3) for g, h in pairs] == [True, True, False, False]
    assert all(g > 0 for g, _ in pairs) and pairs[-1][1] < 0
