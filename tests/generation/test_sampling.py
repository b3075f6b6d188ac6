"""Samplers: what is kept, in what proportion it is drawn, and that a key decides it."""

import math

import pytest
import torch
from chi_square import p_value
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import keys

import llama_fn as lf
from llama_fn.generation import sampling
from llama_fn.generation.sampling import keep_min_p, keep_top_k, keep_top_p, penalize

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5, -3.0, 1.0])


def logits_of(key, *shape: int) -> torch.Tensor:
    return lf.random.normal(key, shape) * 3


def frequencies(sample, logits: torch.Tensor, count: int = 20_000, seed: int = 0) -> torch.Tensor:
    draws = torch.vmap(lambda key: sample(key, logits))(lf.random.split(lf.random.key(seed), count))
    return torch.bincount(draws, minlength=len(logits))


def fits(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Whether nothing impossible was drawn, and the possible in proportion."""
    possible = probabilities > 0
    return bool((counts[~possible] == 0).all()) and p_value(counts[possible], probabilities[possible]) > 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_probabilities(temperature):
    counts = frequencies(lf.sampler(temperature), LOGITS)
    assert fits(counts, (LOGITS / temperature).softmax(-1))
    assert not fits(counts, (LOGITS / (temperature * 1.2)).softmax(-1))  # the test sees such a difference


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}])
def test_narrowed_frequencies_match_the_renormalized_probabilities(settings):
    kept = {"top_k": [2, 4, 6], "top_p": [2, 4, 6], "min_p": [2, 4, 6]}[next(iter(settings))]
    hidden = torch.full_like(LOGITS, -math.inf)
    hidden[kept] = LOGITS[kept]
    assert fits(frequencies(lf.sampler(**settings), LOGITS), hidden.softmax(-1))


@given(keys())
def test_top_k_of_one_is_greedy_and_so_is_temperature_zero(key):
    logits = logits_of(key, 5, 11)
    greedy, key = logits.argmax(-1), lf.random.fold_in(key, 1)  # the logits' own key would draw the likeliest anyway
    for sample in (lf.sampler(top_k=1), lf.sampler(0.0), lf.sampler(5.0, top_p=1e-6), lf.sampler(min_p=1.0)):
        assert torch.equal(sample(key, logits), greedy)


@given(keys(), st.integers(1, 15))
@example(lf.random.key(0), 10**30)
def test_top_k_keeps_the_k_likeliest(key, k):
    logits = logits_of(key, 5, 11)
    kept = keep_top_k(logits, k)
    assert (kept.isfinite().sum(-1) == min(k, 11)).all()
    for row, full in zip(kept, logits, strict=True):
        assert torch.equal(row[row.isfinite()], full[row.isfinite()])
        assert row[row.isfinite()].min() >= full[~row.isfinite()].max() if k < 11 else True


def test_of_equals_top_k_and_greedy_take_the_first():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0])
    assert keep_top_k(logits, 2).isfinite().tolist() == [False, True, True, False]
    assert lf.sampler(top_k=1)(lf.random.key(3), logits) == lf.sampler(0.0)(lf.random.key(0), logits) == 1


@given(keys(), st.floats(0.01, 1.0))
def test_the_kept_mass_of_top_p_is_at_least_p_and_minimal(key, p):
    logits = logits_of(key, 5, 11)
    kept = keep_top_p(logits, p).isfinite()
    for row, keep in zip(logits.softmax(-1).double(), kept, strict=True):
        assert row[keep].sum() >= p - 1e-6
        assert row[keep].sum() - row[keep].min() < p + 1e-6  # without its least likely it would not be enough
        assert keep.all() or row[keep].min() >= row[~keep].max()


def test_top_p_of_one_keeps_everything_and_no_temperature_is_too_low(monkeypatch):
    monkeypatch.setattr(sampling, "keep_top_p", None)  # in float32 the likely ones sum to 1 before the last: not asked
    key = lf.random.key(1)
    assert lf.sampler(top_p=1.0)(key, LOGITS) == lf.sampler()(key, LOGITS)
    assert lf.sampler(1e-38)(key, LOGITS) == LOGITS.argmax()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"temperature": 0.7, "repetition_penalty": 1.3},
                                      {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
@given(keys())
def test_a_sampler_draws_by_its_narrowing(settings, key):
    logits, tokens = logits_of(key, 200, 11), torch.tensor([[3, 3, 7, -1]] * 200)
    narrowed, key = lf.narrowing(**settings)(logits, tokens), lf.random.fold_in(key, 1)
    assert torch.equal(lf.sampler(**settings)(key, logits, tokens), lf.random.categorical(key, narrowed))
    assert (settings == {}) is torch.equal(narrowed, logits)
    if settings.get("temperature") == 0.0:
        assert torch.equal(narrowed.softmax(-1), torch.nn.functional.one_hot(logits.argmax(-1), 11).float())


@given(keys(), st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_likely_enough(key, p):
    logits = logits_of(key, 5, 11)
    probabilities = logits.softmax(-1)
    kept, bound = keep_min_p(logits, p).isfinite(), p * probabilities.amax(-1, keepdim=True)
    assert (probabilities[kept] >= bound.expand_as(probabilities)[kept] * (1 - 1e-5)).all()
    assert (probabilities[~kept] <= bound.expand_as(probabilities)[~kept] * (1 + 1e-5)).all()


@given(keys(), st.floats(1.01, 3.0))
def test_the_repetition_penalty_makes_what_is_there_less_likely_once(key, penalty):
    logits = logits_of(key, 2, 11)
    tokens = torch.tensor([[3, 3, 7, -1], [0, 10, -1, -1]])
    changed = penalize(logits, tokens, penalty)
    there = torch.zeros(2, 11, dtype=torch.bool)
    there[0, [3, 7]] = there[1, [0, 10]] = True
    assert torch.equal(changed[~there], logits[~there]) and (changed[there] < logits[there]).all()
    by_hand = torch.where(logits > 0, logits / penalty, logits * penalty)
    assert torch.equal(changed[there], by_hand[there])
    assert torch.equal(lf.sampler(0.0, repetition_penalty=penalty)(key, logits, tokens), changed.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_a_penalty_is_the_same_whatever_integers_the_tokens_are(dtype):
    logits = logits_of(lf.random.key(0), 2, 301)  # more than 8 bits hold
    tokens = torch.tensor([[3, 127, -1], [0, 10, -128]])
    assert torch.equal(penalize(logits, tokens.to(dtype), 1.5), penalize(logits, tokens, 1.5))


@given(keys())
def test_the_same_key_draws_the_same_token_mapped_or_not(key):
    sample, rows = lf.sampler(0.9, 5, 0.9, 0.01, 1.1), 4
    logits, tokens, each = logits_of(key, rows, 11), torch.full((rows, 3), -1), lf.random.split(key, rows)
    mapped = torch.vmap(sample)(each, logits, tokens)
    assert mapped.tolist() == [int(sample(each[i], logits[i], tokens[i])) for i in range(rows)]


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": -0.1}, r"temperature must lie in \[0, inf\), got -0.1"),
    ({"temperature": math.nan}, "temperature must lie in"),
    ({"temperature": math.inf}, "temperature must lie in"),
    ({"top_k": 0}, r"top_k must be at least 1, got 0"),
    ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
    ({"top_p": 1.1}, "top_p must lie in"),
    ({"min_p": -1.0}, r"min_p must lie in \[0, 1\], got -1.0"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty must lie in \(0, inf\), got 0.0"),
])
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.sampler(**settings)


def test_a_penalty_needs_the_tokens():
    with pytest.raises(ValueError, match="a repetition penalty needs the tokens so far"):
        lf.sampler(repetition_penalty=1.1)(lf.random.key(0), LOGITS)


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="the logits are NaN"):
        lf.sampler()(lf.random.key(0), torch.tensor([0.0, math.nan]))


def test_the_same_settings_are_the_same_sampler():
    assert lf.sampler(0.8, top_p=0.9) == lf.sampler(0.8, top_p=0.9)  # so that a step compiled with it is found again
    assert lf.sampler(0.8, top_p=0.9) != lf.sampler(0.8, top_p=0.8)
    for _ in range(2):  # what is equal to settings that are known is still refused
        assert lf.sampler(1, top_k=4) == lf.sampler(1.0, top_k=4)
        for wrong in ({"top_k": 4.0}, {"top_k": True}, {"temperature": True}):
            with pytest.raises(ValueError):
                lf.sampler(**wrong)
