"""`remat`: the same values and derivatives of every order, for less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import close, direction_like, finite_difference
from strategies import cache_for, keys, models, random_params, token_rows

import llama_fn as lf
from llama_fn.training.step import make_step

B, T = 3, 5
CONFIG = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70)


def all_close(a: Any, b: Any, tolerance: float = 1e-9) -> bool:
    assert lf.tree.structure(a) == lf.tree.structure(b)
    return all(close(x, y, tolerance) for x, y in zip(lf.tree.leaves(a), lf.tree.leaves(b), strict=True))


def loss(layer: Callable) -> Callable[..., torch.Tensor]:
    return lambda params, tokens: lf.loss(params, tokens, layer=layer)


def counted(f: Callable, runs: list) -> Callable:
    """`f`, which adds one to `runs` each time that it comes to its end."""
    def g(*args: Any, **kwargs: Any) -> Any:
        result = f(*args, **kwargs)
        runs.append(1)
        return result

    return g


# --- the model


@given(models(max_layers=2), st.sampled_from([(T,), (B, T)]))
def test_the_layers_of_a_model_may_be_computed_again(params, shape):
    tokens, runs = token_rows(params.config, *shape), []
    layer = lf.remat(counted(lf.block, runs))
    assert torch.equal(lf.forward(params, tokens, layer=layer)[0], lf.forward(params, tokens)[0])
    assert len(runs) == len(params.blocks)
    grads, value = torch.func.grad_and_value(loss(layer))(params, tokens)
    assert len(runs) == 3 * len(params.blocks)  # and again for the gradient
    assert torch.equal(value, lf.loss(params, tokens))
    assert all_close(grads, torch.func.grad(lf.loss)(params, tokens))


@given(models(max_layers=1))
def test_transforms_of_a_model_do_not_notice(params):
    tokens, layer = token_rows(params.config, B, T), lf.remat(lf.block)

    def mapped(layer: Callable) -> Callable:
        return lambda params: torch.vmap(loss(layer), (None, 0))(params, tokens).square().sum()

    def each(layer: Callable) -> Callable:
        return lambda params: torch.vmap(torch.func.grad(loss(layer)), (None, 0))(params, tokens)

    assert all_close(each(layer)(params), each(lf.block)(params))
    assert all_close(torch.func.grad(mapped(layer))(params), torch.func.grad(mapped(lf.block))(params))


@given(models(max_layers=1), keys())
def test_a_hessian_vector_product_through_remat_is_its_finite_difference(params, key):
    tokens, direction = token_rows(params.config, B, T), direction_like(params, key)

    def gradient(params: lf.Params) -> lf.Params:
        return torch.func.grad(loss(lf.remat(lf.block)))(params, tokens)

    expected = finite_difference(gradient, params, direction)
    assert max(x.abs().max() for x in lf.tree.leaves(expected)) > 1e-4  # or all could be zero
    assert all_close(torch.func.vjp(gradient, params)[1](direction)[0], expected, 1e-6)
    assert all_close(torch.func.jvp(gradient, (params,), (direction,))[1], expected, 1e-6)


@given(models(max_layers=1))
def test_a_cache_goes_through_and_gradients_through_the_cache(params):
    layer, tokens = lf.remat(lf.block), token_rows(params.config, B, 4)
    _, cache = lf.forward(params, token_rows(params.config, B, 3), cache_for(params, (B,)))

    def readout(layer: Callable) -> Callable:
        return lambda cache: lf.forward(params, tokens, cache._replace(length=cache.length.long()), layer=layer)

    assert all_close(readout(layer)(cache), readout(lf.block)(cache), 0)
    ours, theirs = (torch.func.vjp(lambda k: readout(f)(cache._replace(k=k))[0], cache.k)[1](  # noqa: B023
        torch.ones(B, 4, params.config.vocab_size, dtype=torch.float64)) for f in (layer, lf.block))
    assert all_close(ours, theirs) and max(x.abs().max() for x in lf.tree.leaves(ours)) > 1e-4


# --- any function of trees, under any transform

W = torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(4, 5)
X = torch.linspace(-2, 1, 12, dtype=torch.float64).reshape(3, 4)
ROWS = torch.tensor([2, 0, 1])


def anything(weights: dict, x: torch.Tensor, rounds: int, *, rows: torch.Tensor | None, switch: bool = False) -> dict:
    """Trees, numbers, None, constants and integers in and out; arguments handed on, and one tensor twice."""
    y = torch.tanh(x @ weights["w"])
    y = (y if rows is None else y[rows]) * (rounds if switch else 1)
    return {"y": (y, None), "again": y, "w": weights["w"], "config": weights["config"], "rounds": rounds + 1,
            "best": y.argmax(-1), "alone": weights["w"].sin(), "rows": rows, "turned": x.T}


def summed(f: Callable) -> Callable[..., torch.Tensor]:
    """A number from all results of `f`, each with another weight."""
    def total(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        result = f({"w": w, "config": CONFIG}, x, 2, rows=ROWS, switch=True)
        assert result["config"] == CONFIG and result["rounds"] == 3 and result["y"][1] is None
        leaves = [leaf for leaf in lf.tree.leaves(result) if isinstance(leaf, torch.Tensor)]
        smooth = [leaf for leaf in leaves if leaf.is_floating_point()]
        assert len(smooth) == 5 and result["best"].dtype == torch.int64 and result["rows"].shape == (3,)
        return sum(i * (leaf**2 + leaf).sum() for i, leaf in enumerate(smooth, 1))

    return total


def cubed(f: Callable) -> Callable:
    return lambda w, x: sum(g.pow(3).sum() for g in torch.func.grad(f, (0, 1))(w, x))


def stacked(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x.flip(0), 2 * x])


TRANSFORMS = {
    "value": lambda f: f,
    "grad": lambda f: torch.func.grad(f, (0, 1)),
    "vmap(grad)": lambda f: lambda w, x: torch.vmap(torch.func.grad(f, (0, 1)), (None, 0))(w, stacked(x)),
    "grad(vmap)": lambda f: torch.func.grad(
        lambda w, x: torch.vmap(f, (None, 1))(w, stacked(x).transpose(0, 1)).pow(2).sum(), (0, 1)),
    "vjp": lambda f: lambda w, x: torch.func.vjp(f, w, x)[1](torch.tensor(3.0, dtype=torch.float64)),
    "jacrev": lambda f: torch.func.jacrev(lambda w, x: torch.vmap(f, (None, 0))(w, stacked(x))),
    "jvp": lambda f: lambda w, x: torch.func.jvp(f, (w, x), (w.cos(), x.cos())),
    "jvp(grad)": lambda f: lambda w, x: torch.func.jvp(torch.func.grad(f, (0, 1)), (w, x), (w.cos(), x.cos())),
    "grad(jvp)": lambda f: torch.func.grad(lambda w, x: torch.func.jvp(f, (w, x), (w.cos(), x.cos()))[1], (0, 1)),
    "grad(grad)": lambda f: torch.func.grad(cubed(f), (0, 1)),
    "vmap(grad(grad))": lambda f: lambda w, x: torch.vmap(torch.func.grad(cubed(f)), (None, 0))(w, stacked(x)),
    "grad(grad(grad))": lambda f: torch.func.grad(cubed(cubed(f))),
    "hessian": lambda f: torch.func.hessian(f),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_function_under_any_transform_does_not_notice(name):
    runs, transform = [], TRANSFORMS[name]
    ours = transform(summed(lf.remat(counted(anything, runs))))(W, X)
    assert same(ours, transform(summed(anything))(W, X))
    if "jvp" not in name and name not in ("value", "hessian"):
        assert len(runs) > 1  # it was computed again, and not given up: see what is closed over, below


def same(ours: Any, theirs: Any) -> bool:
    return all_close(ours, theirs, 1e-12 * max(float(x.abs().max()) for x in lf.tree.leaves(theirs)))


def test_second_derivatives_by_plain_autograd_do_not_notice():
    def second(f: Callable) -> tuple[torch.Tensor, ...]:
        w, x = W.clone().requires_grad_(), X.clone().requires_grad_()
        grads = torch.autograd.grad(f(w, x), (w, x), create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in grads), (w, x))

    assert same(second(summed(lf.remat(anything))), second(summed(anything)))


@pytest.mark.slow
def test_compiled_transforms_do_not_notice():
    def little(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(x @ w), w  # anything takes twice the time to compile

    def squared(f: Callable) -> Callable:
        return lambda w, x: sum(i * (y**2 + y).sum() for i, y in enumerate(f(w, x), 1))

    def results(remat: Callable) -> Callable:
        names = [name for name in TRANSFORMS if name not in ("vmap(grad(grad))", "grad(grad(grad))")]
        return lambda w, x: {"anything": TRANSFORMS["vmap(grad)"](summed(remat(anything)))(w, x),
                             **{name: TRANSFORMS[name](squared(remat(little)))(w, x) for name in names}}

    ours = torch.compile(results(lf.remat), fullgraph=True, backend="aot_eager")(W, X)
    theirs = results(lambda f: f)(W, X)
    assert [name for name in theirs if not same(ours[name], theirs[name])] == [] and len(theirs) == 12


# --- what a function closes over


class Holder:
    """A callable that holds a tensor."""

    def __init__(self, w: torch.Tensor):
        self.w = w

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x @ self.w)


class Product(torch.autograd.Function):
    """x w, by a rule of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return cotangent @ w.T, x.T @ cotangent


CLOSED_OVER = {  # of remat (or the identity) and w, to a function of x that uses w
    "a variable": lambda r, w: r(lambda x: torch.sin(x @ w)),
    "in a tree": lambda r, w: (lambda tree: r(lambda x: torch.sin(x @ tree["w"][0])))({"w": [w.sin()]}),
    "of an object": lambda r, w: r(Holder(w)),
    "of a method": lambda r, w: r(Holder(w).__call__),
    "handed on": lambda r, w: lambda x: torch.mul(*r(lambda x: (torch.sin(x)[:, :, None], w))(x)),
    "and no argument": lambda r, w: lambda x: r(lambda: w.sin())() * x[0, 0],
    "in remat in remat": lambda r, w: r(lambda x: r(lambda x, w: torch.sin(x @ w))(x, w)),
    "under vmap inside": lambda r, w: r(lambda x: torch.vmap(lambda column: torch.sin(x @ column))(w.T)),
    "under grad inside": lambda r, w: r(lambda x: torch.func.grad(lambda w: torch.sin(x @ w).sum())(w)),
    "in a custom rule": lambda r, w: r(lambda x: torch.sin(Product.apply(x, w))),
}


def around(closed: Callable, remat: Callable) -> Callable:
    """Derivatives with regard to what is closed over and to the argument, of first and second order, and mapped."""
    def f(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (closed(remat, w)(x * w.sum()) ** 2).sum()

    return lambda w, x: (torch.func.grad(f, (0, 1))(w, x), torch.func.grad(cubed(f))(w, x),
                         torch.vmap(torch.func.grad(f), (0, None))(stacked(w), x))


@pytest.mark.parametrize("name", CLOSED_OVER)
def test_what_is_closed_over_has_its_gradient(name):
    ours, theirs = (around(CLOSED_OVER[name], remat)(W, X) for remat in (lf.remat, lambda f: f))
    assert same(ours, theirs) and float(theirs[0][0].abs().max()) > 0.1


@pytest.mark.slow
def test_what_is_closed_over_has_its_gradient_compiled():
    def results(remat: Callable) -> Callable:
        def f(closed: Callable) -> Callable:
            return torch.func.grad(lambda w, x: (closed(remat, w)(x * w.sum()) ** 2).sum(), (0, 1))

        return lambda w, x: {name: f(closed)(w, x) for name, closed in CLOSED_OVER.items() if "rule" not in name}

    ours = torch.compile(results(lf.remat), fullgraph=True, backend="aot_eager")(W, X)
    theirs = results(lambda f: f)(W, X)
    assert [name for name in theirs if not same(ours[name], theirs[name])] == [] and len(theirs) == 9


def test_a_parameter_that_requires_a_gradient_may_be_closed_over_too():
    w = W.clone().requires_grad_()
    ours, = torch.autograd.grad(lf.remat(lambda x: torch.sin(x @ w))(X).sum(), w)
    theirs, = torch.autograd.grad(torch.sin(X @ w).sum(), w)
    assert close(ours, theirs)


def test_an_error_in_the_function_is_its_own():
    def wrong(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 2:
            raise ValueError("two rows at most")
        return x @ x

    with pytest.raises(ValueError, match="two rows at most"):
        lf.remat(wrong)(X)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        torch.func.grad(lambda x: lf.remat(wrong)(x).sum())(X[:2])


# --- memory


def peak_bytes(f: Callable, *args: Any) -> int:
    """The most bytes that a call holds at once, from every allocation of torch's on the CPU, compiled code's too."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        f(*args)
    held = peak = 0
    for event in sorted(profile.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def deep(layer: Callable) -> Callable[..., torch.Tensor]:
    def f(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for _ in range(12):
            x = layer(w, x)
        return x.square().mean()

    return f


def wide(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A layer that computes many more numbers than it takes."""
    return x + torch.tanh(torch.sin(x @ w)) @ w.T


@pytest.mark.parametrize("name", ["grad", "vmap(grad)", "grad(vmap)", "vjp", "vjp(grad)", "backward"])
def test_twelve_layers_take_far_less_memory(name):
    def backward(f: Callable) -> Callable:
        w, x = ((y.detach().clone().requires_grad_()) for y in (wide_w, rows))
        return lambda *_: torch.autograd.grad(f(w, x), (w, x))

    wide_w, rows = torch.randn(16, 64) / 8, torch.randn(512, 16)
    transform = {**TRANSFORMS, "backward": backward,
                 "vjp": lambda f: lambda w, x: torch.func.vjp(f, w, x)[1](torch.tensor(3.0)),
                 "vjp(grad)": lambda f: lambda w, x: torch.func.vjp(torch.func.grad(f), w, x)[1](w)}[name]
    kept, again = (peak_bytes(transform(deep(layer)), wide_w, rows) for layer in (wide, lf.remat(wide)))
    assert kept > 3 * again


@pytest.mark.slow
def test_the_compiler_does_not_undo_it():
    w, x = torch.randn(16, 64) / 8, torch.randn(512, 16)
    steps = [torch.compile(torch.func.grad(deep(layer), (0, 1)), fullgraph=True) for layer in (wide, lf.remat(wide))]
    kept, again = (step(w, x) for step in steps)
    assert all_close(kept, again, 1e-4)
    kept, again = (peak_bytes(step, w, x) for step in steps)
    assert kept > 4 * again  # 6.7 times seen; 1.6 if what is computed again does not wait for the cotangents


@pytest.mark.slow
def test_a_compiled_train_step_with_remat_equals_the_eager_one_without():
    params, tokens = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, 1, 3, 8)
    optimizer = lf.optim.sgd(1.0)
    given = params, optimizer.init(params), tokens, tokens != 5
    step = torch.compile(make_step(optimizer, lf.remat(lf.block)), fullgraph=True, backend="aot_eager")
    assert all_close(step(*given), make_step(optimizer)(*given))
