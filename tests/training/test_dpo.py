"""Direct preference optimization: the paper's formula in NumPy, its gradient, and every transform."""

import math

import numpy as np
import pytest
import torch
from adapters import trained
from hypothesis import given
from hypothesis import strategies as st
from numerics import close, direction_like, finite_difference
from strategies import keys, models, random_params, token_rows

import llama_fn as lf
from llama_fn import lora, tree
from llama_fn.training.dpo import dpo_loss_sum

betas = st.floats(0.01, 2.0)


def pairs(config: lf.Config, count: int = 3, lengths: tuple[int, int] = (7, 5)) -> list:
    """Chosen and rejected rows of different lengths, with masks of answers that differ from row to row."""
    rows = []
    for i, length in enumerate(lengths):
        tokens = token_rows(config, count, length, seed=i)
        prompt = 1 + torch.arange(count)[:, None] % (length - 2)  # answers of several lengths, none of them empty
        rows.append((tokens, (torch.arange(length) >= prompt) & (torch.arange(length) != length - 1 - i)))
        rows[-1][1][:, 2] = True
    return rows


def answer_log_p(params: lf.Params, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The log-probability of each row's answer, one row and one token at a time."""
    sums = []
    for row, answer in zip(tokens, mask, strict=True):
        log_p = lf.forward(params, row)[0].log_softmax(-1)
        sums.append(sum((log_p[i - 1, row[i]] for i in range(1, len(row)) if answer[i]), torch.zeros(())))
    return torch.stack(sums)


def by_the_paper(policy: lf.Params, reference: lf.Params, chosen: tuple, rejected: tuple, beta: float) -> float:
    """Equation 7 of Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290), in NumPy:

    L_DPO(pi_theta; pi_ref) = -E_(x, y_w, y_l) [log sigma(beta log (pi_theta(y_w | x) / pi_ref(y_w | x))
                                                          - beta log (pi_theta(y_l | x) / pi_ref(y_l | x)))]
    """
    def pi(params: lf.Params, tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        """The probability of each answer y, given x: the product of the probabilities of its tokens."""
        logits = lf.forward(params, tokens)[0].numpy()
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        p = odds / odds.sum(-1, keepdims=True)
        each = [[p[r, t - 1, tokens[r, t]] if mask[r, t] else 1.0 for t in range(1, tokens.shape[1])]
                for r in range(len(tokens))]
        return np.prod(each, axis=-1)

    w, l = (np.log(pi(policy, *y) / pi(reference, *y)) for y in (chosen, rejected))  # noqa: E741
    return float(-np.mean(np.log(1 / (1 + np.exp(-(beta * w - beta * l))))))


def two(params: lf.Params, key: torch.Tensor) -> tuple[lf.Params, lf.Params]:
    """A policy, and the reference that it has moved away from."""
    return params, random_params(params.config, key)


@given(models(), keys(), betas)
def test_the_loss_is_equation_7_of_the_paper(params, key, beta):
    policy, reference = two(params, key)
    chosen, rejected = pairs(params.config)
    loss = lf.dpo_loss(policy, reference, chosen, rejected, beta=beta)
    assert float(loss) == pytest.approx(by_the_paper(policy, reference, chosen, rejected, beta), abs=1e-9)
    one = lf.dpo_loss(policy, reference, *(tuple(x[0] for x in rows) for rows in (chosen, rejected)), beta=beta)
    alone = [tuple(x[:1] for x in rows) for rows in (chosen, rejected)]
    assert float(one) == pytest.approx(by_the_paper(policy, reference, *alone, beta), abs=1e-9)


@given(models(max_layers=1), keys(), betas)
def test_the_gradient_is_the_papers(params, key, beta):
    """Section 4: -beta E [sigma(r(y_l) - r(y_w)) (grad log pi(y_w | x) - grad log pi(y_l | x))], r = beta log-ratio."""
    policy, reference = two(params, key)
    chosen, rejected = pairs(params.config)
    grads = torch.func.grad(lf.dpo_loss)(policy, reference, chosen, rejected, beta=beta)

    def log_ratio(rows: tuple) -> torch.Tensor:
        return answer_log_p(policy, *rows) - answer_log_p(reference, *rows)

    weights = torch.sigmoid(beta * (log_ratio(rejected) - log_ratio(chosen)))

    def weighted(policy: lf.Params) -> torch.Tensor:
        apart = answer_log_p(policy, *chosen) - answer_log_p(policy, *rejected)
        return -beta * (weights * apart).mean()

    for a, b in zip(*map(tree.leaves, (grads, torch.func.grad(weighted)(policy))), strict=True):
        assert (a - b).abs().max() < 1e-9


@given(models(max_layers=1), keys())
def test_equal_trees_give_log_2_and_so_does_a_beta_of_0(params, key):
    chosen, rejected = pairs(params.config)
    policy, reference = two(params, key)
    assert float(lf.dpo_loss(policy, policy, chosen, rejected, beta=0.7)) == pytest.approx(math.log(2), abs=1e-12)
    assert float(lf.dpo_loss(policy, reference, chosen, rejected, beta=0)) == pytest.approx(math.log(2), abs=1e-12)
    distances = [abs(float(lf.dpo_loss(policy, reference, chosen, rejected, beta=b)) - math.log(2))
                 for b in (1e-3, 1e-5)]
    assert distances[1] < 0.02 * distances[0] + 1e-12  # the limit is reached in a straight line


@given(models(max_layers=1), keys(), betas)
def test_a_pair_and_the_swapped_pair_differ_by_beta_times_its_margin(params, key, beta):
    """-log sigma(x) + log sigma(-x) = -x, so that together they give the margin; and each alone is above 0."""
    policy, reference = two(params, key)
    chosen, rejected = (tuple(x[:1] for x in rows) for rows in pairs(params.config))
    loss = lf.dpo_loss(policy, reference, chosen, rejected, beta=beta)
    swapped = lf.dpo_loss(policy, reference, rejected, chosen, beta=beta)
    ratio_w, ratio_l = (answer_log_p(policy, *x) - answer_log_p(reference, *x) for x in (chosen, rejected))
    assert float(swapped - loss) == pytest.approx(float(beta * (ratio_w - ratio_l)), abs=1e-9)
    assert float(loss) > 0 and float(swapped) > 0
    # Swapping the trees swaps the sign of every log-ratio, as swapping the answers does.
    assert close(swapped, lf.dpo_loss(reference, policy, chosen, rejected, beta=beta))


@given(models(max_layers=1), keys())
def test_a_step_makes_the_chosen_answer_likelier_than_the_rejected_one(params, key):
    chosen, rejected = (tuple(x[:1] for x in rows) for rows in pairs(params.config))

    def margin(policy: lf.Params) -> float:
        return float((answer_log_p(policy, *chosen) - answer_log_p(policy, *rejected)).sum())

    grads = torch.func.grad(lf.dpo_loss)(params, params, chosen, rejected, beta=0.1)
    size = float(tree.vdot(grads, grads))
    stepped = tree.map(lambda p, g: p - 1e-4 * g / size**0.5, params, grads)
    assert size > 0 and margin(stepped) > margin(params)


@given(models(max_layers=1), keys(), st.sampled_from([-100, 2**40]))
def test_padding_changes_nothing(params, key, filler):
    policy, reference = two(params, key)
    chosen, rejected = pairs(params.config)
    loss = lf.dpo_loss(policy, reference, chosen, rejected, beta=0.3)
    tokens, mask = rejected
    padded = (torch.nn.functional.pad(tokens, (0, 3), value=filler), torch.nn.functional.pad(mask, (0, 3)))
    assert close(lf.dpo_loss(policy, reference, chosen, padded, beta=0.3), loss)


# --- the step's form: sums over pairs of rows


@given(models(max_layers=1), keys(), betas)
def test_sums_over_micro_batches_make_the_mean(params, key, beta):
    policy, reference = two(params, key)
    chosen, rejected = pairs(params.config, lengths=(7, 7))
    tokens, mask = (torch.stack(both, 1) for both in zip(chosen, rejected, strict=True))
    parts = [dpo_loss_sum(policy, reference, tokens[at], mask[at], beta=beta) for at in (slice(1), slice(1, 3))]
    total, count = (sum(part) for part in zip(*parts, strict=True))
    assert int(count) == 3 and close(total / count, lf.dpo_loss(policy, reference, chosen, rejected, beta=beta))
    mask[1, 0] = False  # a pair that fills up a batch
    total, count = dpo_loss_sum(policy, reference, tokens, mask, beta=beta)
    others = [tuple(x[::2] for x in rows) for rows in (chosen, rejected)]
    assert int(count) == 2 and close(total / 2, lf.dpo_loss(policy, reference, *others, beta=beta))


# --- transforms


@given(models(max_layers=2), keys(), betas)
def test_forward_mode_and_reverse_mode_agree_with_finite_differences(params, key, beta):
    policy, reference = two(params, key)
    chosen, rejected = pairs(params.config)

    def loss(policy: lf.Params) -> torch.Tensor:
        return lf.dpo_loss(policy, reference, chosen, rejected, beta=beta)

    direction = direction_like(policy, key)
    expected = finite_difference(loss, policy, direction)
    assert close(torch.func.jvp(loss, (policy,), (direction,))[1], expected, 1e-6)
    assert close(tree.vdot(torch.func.grad(loss)(policy), direction), expected, 1e-6)
    hvp = torch.func.jvp(torch.func.grad(loss), (policy,), (direction,))[1]
    again = torch.func.vjp(torch.func.grad(loss), policy)[1](direction)[0]
    for a, b in zip(*map(tree.leaves, (hvp, again)), strict=True):
        assert close(a, b, 1e-8)


@given(models(max_layers=1), keys())
def test_one_gradient_a_pair_is_a_loop_of_gradients(params, key):
    policy, reference = two(params, key)
    chosen, rejected = pairs(params.config)

    def of_pair(chosen: tuple, rejected: tuple) -> lf.Params:
        return torch.func.grad(lf.dpo_loss)(policy, reference, chosen, rejected, beta=0.2)

    each = torch.vmap(of_pair)(chosen, rejected)
    for i in range(3):
        alone = of_pair(*(tuple(x[i] for x in rows) for rows in (chosen, rejected)))
        for a, b in zip(*map(tree.leaves, (each, alone)), strict=True):
            assert close(a[i], b)


@given(models(max_layers=2), keys(), betas, st.booleans())
def test_the_reference_of_an_adapter_is_its_own_base(params, key, beta, remat):
    """The base stays whole, quantized or not, and the merged parameters have the same loss."""
    adapter, (chosen, rejected) = trained(key, params), pairs(params.config)
    layer = lf.remat(lf.block) if remat else lf.block

    def loss(adapter: lora.Lora) -> torch.Tensor:
        return lf.dpo_loss(lora.apply(params, adapter), params, chosen, rejected, beta=beta, layer=layer)

    grads, value = torch.func.grad_and_value(loss)(adapter)
    assert close(value, lf.dpo_loss(lora.merge(params, adapter), params, chosen, rejected, beta=beta))
    direction = direction_like(adapter, key)
    assert close(tree.vdot(grads, direction), finite_difference(loss, adapter, direction), 1e-6)
    fresh = lora.init(key, params, 2)
    assert float(loss(fresh)) == pytest.approx(math.log(2), abs=1e-9)


@given(models(max_layers=1), keys())
def test_many_adapters_are_a_loop_over_them(params, key):
    adapters, (chosen, rejected) = [trained(each, params) for each in lf.random.split(key, 3)], pairs(params.config)

    def of_one(adapter: lora.Lora) -> tuple:
        return torch.func.grad_and_value(
            lambda a: lf.dpo_loss(lora.apply(params, a), params, chosen, rejected, beta=0.1))(adapter)

    together = torch.vmap(of_one)(lora.stack(adapters))
    for i, adapter in enumerate(adapters):
        for a, b in zip(*map(tree.leaves, (together, of_one(adapter))), strict=True):
            assert close(a[i], b)


@pytest.mark.slow
def test_compiled_equals_eager():
    config = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70)
    policy, reference = (random_params(config, lf.random.key(i)) for i in range(2))
    chosen, rejected = pairs(config, lengths=(7, 7))  # of another length, every loop is compiled once more
    both = torch.func.grad_and_value(lf.dpo_loss)
    compiled = torch.compile(lambda p, r, c, j: both(p, r, c, j, beta=0.1), fullgraph=True)
    for a, b in zip(*map(tree.leaves, (compiled(policy, reference, chosen, rejected),
                                       both(policy, reference, chosen, rejected, beta=0.1))), strict=True):
        assert close(a, b)


def test_what_is_no_pair_of_batches_is_an_error():
    config = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70)
    params = random_params(config, lf.random.key(0))
    chosen, rejected = pairs(config)
    with pytest.raises(ValueError, match="beta must lie in"):
        lf.dpo_loss(params, params, chosen, rejected, beta=-0.1)
    with pytest.raises(lf.AxesError, match="rejected"):
        lf.dpo_loss(params, params, chosen, tuple(x[:2] for x in rejected), beta=0.1)
    with pytest.raises(lf.AxesError, match="chosen"):
        lf.dpo_loss(params, params, (chosen[0], chosen[0]), rejected, beta=0.1)
