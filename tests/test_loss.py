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
