"""The loss, and one step of training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import models, token_rows

import llama_fn as lf
from llama_fn.training.step import make_step


@given(models())
def test_the_loss_is_the_mean_of_minus_log_p_of_the_next_token(params):
    tokens = token_rows(params.config, 3, 7)
    by_hand = []
    for row in tokens:
        probabilities = lf.forward(params, row)[0].softmax(-1)
        by_hand += [-math.log(probabilities[i, row[i + 1]]) for i in range(6)]
    assert float(lf.loss(params, tokens)) == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-9)


@given(models(), st.lists(st.booleans(), min_size=21, max_size=21))
def test_masked_tokens_do_not_count(params, flags):
    tokens, mask = token_rows(params.config, 3, 7), torch.tensor(flags).reshape(3, 7)
    total, count = lf.loss_sum(params, tokens, mask)
    each = [float(lf.loss(params, row[:i + 1]) * i - (lf.loss(params, row[:i]) * (i - 1) if i > 1 else 0))
            for row, counts in zip(tokens, mask, strict=True) for i in range(1, 7) if counts[i]]
    assert int(count) == len(each) == int(mask[:, 1:].sum())
    assert float(total) == pytest.approx(sum(each), abs=1e-7)
    assert float(lf.loss(params, tokens, mask)) == pytest.approx(sum(each) / max(len(each), 1), abs=1e-7)


def test_a_row_of_one_token_predicts_nothing():
    params = lf.init_params(lf.random.key(0), lf.Config(48, 1, 6, 2, 77, 70))
    with pytest.raises(ValueError, match="a row needs 2 tokens or more, one to predict the next from, got 1"):
        lf.loss(params, torch.tensor([3]))


def test_where_nothing_counts_loss_and_gradient_are_zero():
    params = lf.init_params(lf.random.key(0), lf.Config(48, 1, 6, 2, 77, 70))
    tokens = token_rows(params.config, 3, 7)
    grads, loss = torch.func.grad_and_value(lf.loss)(params, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    assert float(loss) == 0 and all((g == 0).all() for g in lf.tree.leaves(grads))


@given(models(max_layers=1), st.lists(st.booleans(), min_size=42, max_size=42))
def test_micro_batches_equal_one_batch_however_the_tokens_are_spread(params, flags):
    tokens, mask = token_rows(params.config, 6, 7), torch.tensor(flags).reshape(6, 7)
    mask[:3, 2:] = False  # the first micro-batch counts few tokens, the second many: a mean of means would differ
    mask[3, 3] = True
    optimizer = lf.optim.sgd(1.0)
    step, state = make_step(optimizer), optimizer.init(params)
    one, _, all_at_once = step(params, state, tokens[None], mask[None])
    two, _, in_two = step(params, state, tokens.unflatten(0, (2, 3)), mask.unflatten(0, (2, 3)))
    six, _, _ = step(params, state, tokens[:, None], mask[:, None])
    for a, b, c in zip(*map(lf.tree.leaves, (one, two, six)), strict=True):
        assert (a - b).abs().max() < 1e-9 and (a - c).abs().max() < 1e-9
    assert float(all_at_once.loss) == pytest.approx(float(lf.loss(params, tokens, mask)), abs=1e-9)
    assert int(in_two.count) == int(mask[:, 1:].sum())


def test_a_step_descends_and_changes_nothing_that_it_was_given():
    params = lf.init_params(lf.random.key(0), lf.Config(48, 2, 6, 2, 77, 70))
    tokens = token_rows(params.config, 1, 3, 9)
    mask, optimizer = torch.ones_like(tokens, dtype=torch.bool), lf.optim.adamw(3e-3)
    state = optimizer.init(params)
    before = lf.tree.map(torch.clone, (params, state))
    step, losses, now = make_step(optimizer), [], (params, state)
    for _ in range(30):
        *now, metrics = step(*now, tokens, mask)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.2 * losses[0]
    assert all(map(torch.equal, lf.tree.leaves(before), lf.tree.leaves((params, state))))


@given(models(), st.lists(st.booleans(), min_size=21, max_size=21), st.sampled_from([-100, -1, 2**40]))
def test_behind_the_last_token_that_counts_any_id_will_do(params, flags, outside):
    tokens, mask = token_rows(params.config, 3, 7), torch.tensor(flags).reshape(3, 7)
    mask[0], mask[1, -1] = False, False  # a row in which nothing counts, one whose last does not
    counted = [max([i for i in range(1, 7) if row[i]], default=-1) for row in mask.tolist()]
    filled = tokens.where(torch.arange(7) <= torch.tensor(counted)[:, None], outside)
    expected = torch.func.grad_and_value(lf.loss)(params, tokens, mask)
    for a, b in zip(*map(lf.tree.leaves, (torch.func.grad_and_value(lf.loss)(params, filled, mask), expected)),
                    strict=True):
        assert (a - b).abs().max() < 1e-12
    assert lf.loss_sum(params, filled, mask)[1] == lf.loss_sum(params, tokens, mask)[1]
    mapped = torch.vmap(torch.func.grad_and_value(lf.loss_sum, has_aux=True), (None, 0, 0))
    for a, b in zip(*map(lf.tree.leaves, (mapped(params, filled, mask), mapped(params, tokens, mask))), strict=True):
        assert (a - b).abs().max() < 1e-12
    assert torch.allclose(lf.per_sample_norms(lf.loss, params, (filled, mask)),
                          lf.per_sample_norms(lf.loss, params, (tokens, mask)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("outside", [-100, -1, 77, 2**40])
def test_a_token_outside_on_which_the_loss_depends_is_an_error_that_names_it(outside):
    params = lf.init_params(lf.random.key(0), lf.Config(48, 1, 6, 2, 77, 70))
    every = torch.ones(3, 7, dtype=torch.bool)
    before_another = every.clone()
    before_another[1, 4] = False  # it does not count itself, but those that do see it
    for place, mask in ((6, None), (0, None), (4, None), (6, every), (4, before_another), (0, every)):
        tokens = token_rows(params.config, 3, 7)
        tokens[1, place] = outside
        each = torch.vmap(torch.func.grad(lf.loss), (None, 0, None if mask is None else 0))
        for f in (lf.loss, lf.loss_sum, torch.func.grad(lf.loss), torch.func.grad_and_value(lf.loss), each):
            with pytest.raises(ValueError, match=f"(token|target) {outside} is outside the vocabulary of 77 tokens"):
                f(params, tokens, mask)
