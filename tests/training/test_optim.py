"""Optimizers against Optax, against torch's own, and by their laws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys

import llama_fn as lf

OPTAX = json.loads((Path(__file__).parent.parent / "data" / "optax_adamw.json").read_text())  # made with Optax 0.2.8
OPTIMIZERS = {
    "sgd": lf.optim.sgd(0.1),
    "adamw": lf.optim.adamw(0.1),
    "adamw with a schedule": lf.optim.adamw(lf.optim.warmup_cosine(0.1, 2, 9), mask=lf.optim.matrices),
    "lion": lf.optim.lion(0.02, 0.9, 0.9),
    "muon": lf.optim.muon(0.1),
    "clip": lf.optim.clip_by_global_norm(0.5),
    "chain": lf.optim.chain(lf.optim.clip_by_global_norm(0.5), lf.optim.adamw(0.1)),
}


def tensors(value: dict) -> dict:
    return {name: torch.tensor(x) for name, x in value.items()}


def normal_tree(key) -> dict:
    one, two = lf.random.split(key)
    return {"w": lf.random.normal(one, (3, 2)), "b": (lf.random.normal(two, (5,)),)}


def test_the_chain_of_clip_and_adamw_takes_the_steps_of_optax():
    schedule = lf.optim.warmup_cosine(0.05, 2, 6, 0.005)
    optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0),
                               lf.optim.adamw(schedule, 0.9, 0.99, weight_decay=0.1, mask=lf.optim.matrices))
    params = tensors(OPTAX["params"])
    state = optimizer.init(params)
    for grads, expected in zip(OPTAX["grads"], OPTAX["trajectory"], strict=True):
        updates, state = optimizer.update(tensors(grads), state, params)
        params = lf.optim.apply_updates(params, updates)
        for name, x in tensors(expected).items():
            assert (params[name] - x).abs().max() < 1e-6  # float32, numbers near 1


def test_the_schedule_is_that_of_optax():
    schedule = lf.optim.warmup_cosine(0.05, 2, 6, 0.005)
    for number in (torch.tensor, int):
        ours = [float(schedule(number(count))) for count in range(9)]
        assert ours == pytest.approx(OPTAX["schedule"], abs=1e-8)


@given(st.floats(1e-4, 1.0), st.integers(0, 5), st.integers(1, 9), st.floats(0.0, 0.1))
def test_the_linear_schedule_goes_through_its_three_points_in_straight_lines(peak, warmup, rest, end):
    schedule = lf.optim.warmup_linear(peak, warmup, warmup + rest, end)
    points = [(0, 0.0)] * (warmup > 0) + [(warmup, peak), (warmup + rest, end)]
    counts = range(warmup + rest + 3)
    for number in (torch.tensor, int):
        assert [float(schedule(number(count))) for count in counts] == pytest.approx(
            np.interp(counts, *zip(*points, strict=True)), abs=1e-6)
    with pytest.raises(ValueError, match=r"warmup_linear: warmup \(5\) must lie in \[0, steps\), and steps is 5"):
        lf.optim.warmup_linear(peak, 5, 5)


@given(st.floats(1e-4, 1.0), st.integers(0, 5), st.integers(0, 9), st.integers(1, 9), st.floats(0.0, 0.1))
def test_the_stable_schedule_goes_through_its_four_points_in_straight_lines(peak, warmup, rest, decay, end):
    schedule = lf.optim.warmup_stable_decay(peak, warmup, decay, warmup + rest + decay, end)
    points = ([(0, 0.0)] * (warmup > 0) + [(warmup, peak)] + [(warmup + rest, peak)] * (rest > 0)
              + [(warmup + rest + decay, end)])
    counts = range(warmup + rest + decay + 3)
    for number in (torch.tensor, int):
        assert [float(schedule(number(count))) for count in counts] == pytest.approx(
            np.interp(counts, *zip(*points, strict=True)), abs=1e-6)
    with pytest.raises(ValueError, match=r"decay \(5\) must lie in \(0, steps - warmup\], and that is 4"):
        lf.optim.warmup_stable_decay(peak, 1, 5, 5)


def test_a_schedule_of_nothing_but_warmup_is_refused():
    with pytest.raises(ValueError, match=r"warmup \(5\) must lie in \[0, steps\), and steps is 5"):
        lf.optim.warmup_cosine(1.0, 5, 5)


@given(keys(), st.floats(1e-3, 1.0), st.floats(0.0, 0.5))
def test_adamw_takes_the_steps_of_torch(key, rate, decay):
    params = normal_tree(key)
    theirs = [x.clone().requires_grad_() for x in lf.tree.leaves(params)]
    reference = torch.optim.AdamW(theirs, rate, (0.9, 0.95), 1e-8, decay)
    optimizer = lf.optim.adamw(rate, 0.9, 0.95, weight_decay=decay)
    state = optimizer.init(params)
    for i in range(4):
        grads = normal_tree(lf.random.fold_in(key, i))
        for x, g in zip(theirs, lf.tree.leaves(grads), strict=True):
            x.grad = g.clone()
        reference.step()
        updates, state = optimizer.update(grads, state, params)
        params = lf.optim.apply_updates(params, updates)
    for ours, x in zip(lf.tree.leaves(params), theirs, strict=True):
        assert (ours - x.detach()).abs().max() < 1e-4 * max(1, rate * 10)


@given(keys(), st.floats(1e-3, 1.0), st.floats(0.0, 0.5))
def test_lion_takes_the_steps_of_its_paper(key, rate, decay):
    """Chen et al. 2023, algorithm 2, in NumPy."""
    params = normal_tree(key)
    optimizer = lf.optim.lion(rate, 0.9, 0.99, weight_decay=decay)
    state, theta, m = optimizer.init(params), params["w"].numpy().copy(), np.zeros((3, 2), np.float32)
    for i in range(4):
        grads = normal_tree(lf.random.fold_in(key, i))
        updates, state = optimizer.update(grads, state, params)
        params = lf.optim.apply_updates(params, updates)
        g = grads["w"].numpy()
        theta = theta - rate * (np.sign(0.9 * m + (1 - 0.9) * g) + decay * theta)
        m = 0.99 * m + (1 - 0.99) * g
    assert np.abs(params["w"].numpy() - theta).max() < 1e-5


def muon_in_numpy(g: np.ndarray) -> np.ndarray:
    """The iteration, on singular values alone: it leaves singular vectors as they are."""
    u, s, v = np.linalg.svd(g, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@given(keys(), st.floats(1e-3, 0.1), st.floats(0.0, 0.5))
def test_muon_takes_the_steps_of_its_formulas_and_about_those_of_torch(key, rate, decay):
    x = lf.random.normal(key, (5, 3), torch.float64)
    params = {"w": x, "b": lf.random.normal(key, (4,), torch.float64)}
    theirs = x.clone().requires_grad_()
    reference = torch.optim.Muon([theirs], rate, decay, 0.95, adjust_lr_fn="match_rms_adamw")
    adamw, optimizer = lf.optim.adamw(rate, 0.9, 0.95, weight_decay=decay), lf.optim.muon(rate, weight_decay=decay)
    state, adam, theta, b, m = optimizer.init(params), adamw.init(params["b"]), x.numpy(), params["b"], 0
    for i in range(3):
        g = {name: lf.random.normal(lf.random.fold_in(key, i), p.shape, torch.float64) for name, p in params.items()}
        updates, state = optimizer.update(g, state, params)
        params = lf.optim.apply_updates(params, updates)
        theirs.grad = g["w"].clone()
        reference.step()
        m = 0.95 * m + g["w"].numpy()
        theta = theta - rate * (0.2 * 5**0.5 * muon_in_numpy(g["w"].numpy() + 0.95 * m) + decay * theta)
        update, adam = adamw.update(g["b"], adam, b)
        b = b + update
    assert np.abs(params["w"].numpy() - theta).max() < 1e-9
    assert (params["w"] - theirs.detach()).abs().max() < 0.1 * rate  # torch iterates in bfloat16
    assert (params["b"] - b).abs().max() < 1e-12


@given(keys())
def test_muon_sees_a_models_hidden_matrices_with_their_heads_flattened(key):
    config = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70)
    params = lf.init_params(key, config)
    optimizer = lf.optim.muon(1.0, weight_decay=0)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    flat = {"wq": (48, 48), "wk": (16, 48), "wv": (16, 48), "wo": (48, 48), "w_gate": (70, 48), "w_up": (70, 48),
            "w_down": (48, 70)}
    assert state[0].momentum.keys() == {f"blocks.{i}.{'attention' if name[1] in 'qkvo' else 'feed_forward'}.{name}"
                                        for i in (0, 1) for name in flat}
    for path, update in lf.tree.paths(updates).items():
        if (shape := flat.get(path.split(".")[-1])) is not None:
            sizes = torch.linalg.svdvals(update.reshape(shape)) / (0.2 * max(shape) ** 0.5)
            assert sizes.max() < 1.3 and sizes.median() > 0.6
        else:
            assert 0.999 < update.abs().median() < 1.001  # Adam's first step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_is_pure_and_keeps_the_trees(name):
    optimizer, params, grads = OPTIMIZERS[name], normal_tree(lf.random.key(0)), normal_tree(lf.random.key(1))
    _, state = optimizer.update(params, optimizer.init(params), params)  # no longer zero
    before = lf.tree.map(torch.clone, (params, grads, state))
    first = optimizer.update(grads, state, params)
    assert lf.tree.structure(first) == lf.tree.structure((params, state))
    assert [x.shape for x in lf.tree.leaves(first)] == [x.shape for x in lf.tree.leaves((params, state))]
    again = optimizer.update(grads, state, params)
    assert all(map(torch.equal, lf.tree.leaves(first), lf.tree.leaves(again)))
    assert all(map(torch.equal, lf.tree.leaves(before), lf.tree.leaves((params, grads, state))))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("clip", "adamw with a schedule")])
def test_an_optimizer_goes_down_a_bowl(name):
    optimizer, params = OPTIMIZERS[name], normal_tree(lf.random.key(0))
    state = optimizer.init(params)
    for _ in range(200):
        updates, state = optimizer.update(params, state, params)  # the gradient of half the square is the point itself
        params = lf.optim.apply_updates(params, updates)
    assert float(lf.optim.global_norm(params)) < 0.1


@given(keys(), st.floats(0.01, 100))
def test_clipping_bounds_the_common_norm_and_keeps_the_direction(key, bound):
    grads = normal_tree(key)
    clipped, _ = lf.optim.clip_by_global_norm(bound).update(grads, (), grads)
    before, after = (float(lf.optim.global_norm(x)) for x in (grads, clipped))
    assert after == pytest.approx(min(before, bound), rel=1e-5)
    assert torch.allclose(clipped["w"] * before, grads["w"] * after, rtol=1e-4, atol=1e-6)


ADAM = lf.optim.scale_by_adam(0.9, 0.99, 1e-8)


def adams_direction(*grads: torch.Tensor) -> torch.Tensor:
    """The direction after these gradients."""
    state = ADAM.init(grads[0])
    for g in grads:
        updates, state = ADAM.update(g, state)
    return updates


@given(keys(), st.sampled_from([torch.float32, torch.float64]))
def test_adams_direction_is_the_formula_to_the_last_bit_at_zero_too(key, dtype):
    sizes = torch.tensor([0, 1e-30, 1e-18, 1e-8, 1e-4, 1, 1e4, 0, 1], dtype=dtype)
    grads = lf.random.normal(key, (3, 9), dtype) * sizes
    mu = nu = torch.zeros(9, dtype=dtype)
    for g in grads:
        mu, nu = 0.9 * mu + (1 - 0.9) * g, 0.99 * nu + (1 - 0.99) * g.square()
    three = torch.tensor(3, dtype=dtype)
    expected = mu / (1 - 0.9**three) / ((nu / (1 - 0.99**three)).sqrt() + 1e-8)
    assert torch.equal(adams_direction(*grads), expected)


@given(keys(), st.integers(1, 3))
def test_adams_direction_has_its_true_slope_where_all_gradients_are_zero(key, steps):
    zeros = tuple(torch.zeros(4, dtype=torch.float64) for _ in range(steps))
    along = tuple(lf.random.normal(k, (4,), torch.float64) for k in lf.random.split(key, steps))
    _, forward = torch.func.jvp(adams_direction, zeros, along)
    step = 1e-20  # the direction is m / (|g| + eps), as good as linear in a neighborhood much smaller than eps
    expected = (adams_direction(*(step * x for x in along)) - adams_direction(*zeros)) / step
    assert torch.allclose(forward, expected, rtol=1e-9) and (forward.abs() > 1).all()
    backward = torch.func.grad(lambda grads: adams_direction(*grads) @ along[0])(zeros)
    assert all(x.isfinite().all() for x in backward)
    curvature = torch.func.hessian(lambda g: adams_direction(*zeros[1:], g).sum())(zeros[0])
    assert curvature.isfinite().all()


@pytest.mark.parametrize("make", [lf.optim.sgd, lf.optim.adamw])
@given(keys())
def test_the_learning_rate_may_be_a_tensor_and_has_a_gradient(make, key):
    params, grads = normal_tree(key), normal_tree(lf.random.fold_in(key, 1))

    def updates(rate):
        return make(rate).update(grads, make(rate).init(params), params)[0]

    rate = torch.tensor(0.1)
    assert all(map(torch.allclose, lf.tree.leaves(updates(rate)), lf.tree.leaves(updates(0.1))))
    slopes = torch.func.jacrev(updates)(rate)
    assert all(map(torch.allclose, lf.tree.leaves(slopes), lf.tree.leaves(updates(1.0))))


def test_only_matrices_decay():
    mask = lf.optim.matrices({"w": torch.ones(3, 2), "b": (torch.ones(5),)})
    assert mask == {"w": True, "b": (False,)}
    params = {"w": torch.ones(3, 2), "b": (torch.ones(5),)}
    optimizer = lf.optim.adamw(0.1, weight_decay=0.5, mask=lf.optim.matrices)
    updates, _ = optimizer.update(lf.tree.map(torch.zeros_like, params), optimizer.init(params), params)
    assert (updates["w"] == -0.05).all() and (updates["b"][0] == 0).all()


def test_a_bfloat16_parameter_has_a_float32_state_and_stays_bfloat16():
    params = {"w": torch.ones(3, 2, dtype=torch.bfloat16)}
    optimizer = lf.optim.adamw(0.1)
    state = optimizer.init(params)
    updates, _ = optimizer.update(params, state, params)
    assert state[0].mu["w"].dtype == torch.float32
    assert lf.optim.apply_updates(params, updates)["w"].dtype == torch.bfloat16
