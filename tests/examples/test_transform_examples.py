"""The examples of first derivatives: against loops, finite differences and plain autograd, in float64."""

import re

import example
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import keys, models, token_rows
from torch import Tensor

import llama_fn as lf

influences = example.functions("influence").influences
saliency, nats = (getattr(example.functions("token_gradients"), name) for name in ("saliency", "nats"))
trained = example.functions("learn_learning_rate").trained
maml_loss = example.functions("maml").maml_loss
prefix_loss = example.functions("soft_prompt").prefix_loss

few = settings(max_examples=4)  # a model each, and many gradients of it
small = models(max_layers=1)


def slope(f, at, direction, step: float = 1e-5) -> float:
    """The central difference of f along a direction."""
    ahead, behind = (f(lf.tree.map(lambda x, d: x + s * d, at, direction)) for s in (step, -step))  # noqa: B023
    return float(ahead - behind) / (2 * step)


# --- influence


def examples(params: lf.Params) -> tuple[Tensor, Tensor]:
    """Four rows, and which of their tokens count: not the same number in each."""
    return token_rows(params.config, 4, 7), torch.arange(7) < torch.tensor([7, 5, 6, 3])[:, None]


def masked_loss(params: lf.Params, x: tuple[Tensor, Tensor]) -> Tensor:
    return lf.loss(params, *x)


@few
@given(small)
def test_influence_is_a_loop_of_dot_products_of_gradients(params):
    tokens, mask = examples(params)
    grads = [torch.func.grad(lf.loss)(params, *x) for x in zip(tokens, mask, strict=True)]
    dots = torch.stack([lf.tree.vdot(grad, grads[-1]) for grad in grads[:-1]])
    ours = influences(masked_loss, params, (tokens[:-1], mask[:-1]), (tokens[-1], mask[-1]), 0.3)
    assert (ours - 0.3 * dots).abs().max() < 1e-9 and dots.abs().min() > 1e-6


@few
@given(small)
def test_influence_is_what_a_small_step_on_the_example_gains(params):
    tokens, mask = examples(params)
    test, rate = (tokens[-1], mask[-1]), 1e-5
    ours = influences(masked_loss, params, (tokens[:-1], mask[:-1]), test, rate)
    for one, x in zip(ours, zip(tokens, mask, strict=True), strict=False):
        step = torch.func.grad(masked_loss)(params, x)
        gain = -rate * slope(lambda p: masked_loss(p, test), params, lf.tree.map(torch.neg, step))
        assert float(one) == pytest.approx(gain, rel=1e-4)


# --- gradients a token


@few
@given(small, keys())
def test_saliency_at_a_position_is_the_slope_of_its_embedding_alone(params, key):
    unused, target = params.config.vocab_size - 1, 2
    tokens = torch.tensor([3, 5, 3, 1, 3, 4])  # one token at three positions
    rows = saliency(params, tokens, target)
    for i in range(len(tokens)):
        there = tokens.clone()
        there[i] = unused  # a token that is nowhere else, with the embedding that was here
        direction = lf.random.normal(key, (params.config.dim,), torch.float64)

        def log_p(x):
            table = params.embedding.clone()
            table[unused] = x
            return lf.forward(params._replace(embedding=table), there)[0][-1].softmax(-1)[target].log()  # noqa: B023

        expected = slope(log_p, params.embedding[tokens[i]], direction)
        assert float(rows[i] @ direction) == pytest.approx(expected, rel=1e-5)


@few
@given(small)
def test_saliency_of_equal_tokens_adds_up_to_the_gradient_of_the_table(params):
    tokens = torch.tensor([3, 5, 3, 1, 3, 4])
    whole = torch.func.grad(lambda p: lf.forward(p, tokens)[0][-1].log_softmax(-1)[2])(params).embedding
    ours = torch.zeros_like(whole).index_add(0, tokens, saliency(params, tokens, 2))
    assert (ours - whole).abs().max() < 1e-9


@few
@given(small)
def test_the_gradients_of_tokens_are_those_of_their_own_losses_one_by_one(params):
    tokens = token_rows(params.config, 6)
    at = params.norm.clone().requires_grad_()
    losses = nats(params._replace(norm=at), tokens)
    assert float(losses.detach().mean()) == pytest.approx(float(lf.loss(params, tokens)), abs=1e-9)
    one_by_one = torch.stack([torch.autograd.grad(x, at, retain_graph=True)[0] for x in losses])
    ours = torch.func.jacrev(lambda norm: nats(params._replace(norm=norm), tokens))(params.norm)
    assert (ours - one_by_one).abs().max() < 1e-9


# --- training as a function


def corpus(params: lf.Params) -> Tensor:
    """Batches whose tokens leave half of the vocabulary unused: those rows of the embedding have gradients of 0."""
    return token_rows(params.config, 4, 3, 7) // 2


@few
@given(small, st.floats(1e-4, 1e-2))
def test_the_slope_of_the_rate_is_its_finite_difference(params, rate):
    batches, rate = corpus(params), torch.tensor(rate, dtype=torch.float64)

    def end(rate: Tensor) -> Tensor:
        return lf.loss(trained(rate, params, batches[:-1]), batches[-1])

    reverse, forward = torch.func.grad(end)(rate), torch.func.jvp(end, (rate,), (torch.ones_like(rate),))[1]
    assert reverse == pytest.approx(float(forward), rel=1e-9)
    assert reverse == pytest.approx(slope(end, rate, torch.ones_like(rate), float(rate) * 1e-6), rel=1e-3)


@few
@given(small, keys())
def test_the_meta_gradient_of_adamw_is_its_finite_difference(params, key):
    batches, rate = corpus(params), torch.tensor(1e-3, dtype=torch.float64)

    def end(params: lf.Params) -> Tensor:
        return lf.loss(trained(rate, params, batches[:-1]), batches[-1])

    direction = lf.random.like(key, params)
    ours = torch.func.grad(end)(params)
    assert all(x.isfinite().all() for x in lf.tree.leaves(ours))
    assert lf.tree.vdot(ours, direction) == pytest.approx(slope(end, params, direction, 1e-8), rel=1e-3)


@few
@given(small, keys())
def test_mamls_gradient_is_its_finite_difference_and_not_that_of_first_order(params, key):
    inner, (support, query) = lf.optim.sgd(0.5), token_rows(params.config, 2, 3, 5, 7)
    direction = lf.random.like(key, params)
    ours = torch.func.grad(maml_loss)(params, inner, support, query)
    product = float(lf.tree.vdot(ours, direction))
    assert product == pytest.approx(slope(lambda p: maml_loss(p, inner, support, query), params, direction), rel=1e-5)

    first_order = 0.0
    for one, other in zip(support, query, strict=True):
        there = lf.tree.map(lambda p, g: p - 0.5 * g, params, torch.func.grad(lf.loss)(params, one))
        first_order += float(lf.tree.vdot(torch.func.grad(lf.loss)(there, other), direction)) / 3
    assert abs(product - first_order) > 1e-3 * abs(product)


@few
@given(small)
def test_mamls_tasks_adapt_one_by_one(params):
    support, query = token_rows(params.config, 2, 3, 5, 7)
    losses = []
    for one, other in zip(support, query, strict=True):
        there = lf.tree.map(lambda p, g: p - 0.1 * g, params, torch.func.grad(lf.loss)(params, one))
        losses.append(float(lf.loss(there, other)))
    assert maml_loss(params, lf.optim.sgd(0.1), support, query) == pytest.approx(sum(losses) / 3, abs=1e-9)


# --- a prefix


def prefixed(params: lf.Params) -> tuple[Tensor, lf.Cache]:
    """Four words and the cache after them, with room for more."""
    words = token_rows(params.config, 4, seed=1)
    room = lf.init_cache(params.config, max_len=13, dtype=torch.float64)
    return words, lf.forward(params, words, room)[1]


@few
@given(models())
def test_a_prefix_of_real_words_is_those_words(params):
    (words, (*kv, length)), tokens = prefixed(params), token_rows(params.config, 3, 7)
    whole = torch.cat([words.expand(3, -1), tokens], 1)
    logits, _ = lf.forward(params, whole[:, :-1])
    expected = -logits[:, 4:].log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    assert prefix_loss(tuple(kv), length, params, tokens) == pytest.approx(float(expected), abs=1e-9)


@few
@given(models(max_layers=2), keys())
def test_the_gradient_of_a_prefix_is_its_finite_difference_and_0_beyond(params, key):
    (_, (*kv, length)), tokens = prefixed(params), token_rows(params.config, 3, 7)
    kv, before = tuple(kv), lf.tree.map(torch.clone, params)
    direction = lf.random.like(key, kv)
    grads = torch.func.grad(prefix_loss)(kv, length, params, tokens)
    expected = slope(lambda x: prefix_loss(x, length, params, tokens), kv, direction)
    assert lf.tree.vdot(grads, direction) == pytest.approx(expected, rel=1e-6)
    for g in lf.tree.leaves(grads):
        assert g[:, :4].abs().min() > 0 and g[:, 4:].abs().max() == 0
    assert all(map(torch.equal, lf.tree.leaves(params), lf.tree.leaves(before)))


# --- the pages


@pytest.mark.slow
def test_the_examples_of_transforms_run(capsys):
    scores = re.findall(r"([+-][\d.]+)  (.*)", example.run("influence", capsys))
    assert ["Ada" in text for _, text in scores] == [True] * 3 + [False] * 3
    assert "girl named Ada" in scores[0][1] and float(scores[0][0]) > 0.1 > 0 > float(scores[-1][0])

    assert example.run("token_gradients", capsys).startswith("depends on [' red'")

    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", example.run("learn_learning_rate", capsys))]
    assert losses[-1] < 0.7 * losses[0]

    pairs = re.findall(r"loss ([\d.]+), after one step ([\d.]+)", example.run("maml", capsys))
    (_, first), (before, after) = pairs[0], pairs[-1]
    assert float(after) < 0.8 * float(before) and float(after) < 0.6 * float(first)  # 0.67 and 0.44 seen

    chances = [float(x) for x in re.findall(r"= ([\d.]+)", example.run("soft_prompt", capsys))]
    assert chances[0] < 0.2 and chances[-1] > 0.5
