"""Speculative decoding: the draft decides the speed and the target the text."""

import dataclasses
import math

import pytest
import torch
from chi_square import p_value
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, keys, random_params, token_rows

import llama_fn as lf
from llama_fn.generation import decode, speculative
from llama_fn.generation import state as rows_state

SAMPLERS = [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2},
            {"temperature": 0.9, "top_k": 4, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.7}]


@st.composite
def pairs(draw) -> tuple[lf.Params, lf.Params]:
    """A target and a draft: two random models of different configs, with one vocabulary."""
    target = draw(configs(max_layers=1))
    draft = draw(configs(target.vocab_size, max_layers=1))
    return tuple(random_params(config, draw(keys())) for config in (target, draft))


def small_pair(dtype: torch.dtype = torch.float64) -> tuple[lf.Params, lf.Params]:
    """A target and a draft with a vocabulary of five tokens."""
    target = lf.Config(48, 2, 6, 2, 5, 70, max_seq_len=64)
    draft = lf.Config(24, 1, 6, 3, 5, 31, max_seq_len=64)
    each = [lf.init_params(lf.random.key(seed), config, dtype) for seed, config in enumerate((target, draft))]
    return tuple(params._replace(output=2 * params.output) for params in each)


def written(target, draft, prompts, keys, narrow, n, limits, end=-1):
    """The tokens of every row, and how many were proposed and accepted for each."""
    rows, proposed, accepted = [[] for _ in prompts], [0] * len(prompts), [0] * len(prompts)
    for round in speculative.rounds(target, draft, prompts, keys, narrow, n, [end], limits):
        rows[round.row] += round.tokens
        proposed[round.row] += round.proposed
        accepted[round.row] += round.accepted
    return rows, proposed, accepted


def plainly(target, prompts, keys, sample, limits, end=-1):
    """The tokens of every row, without a draft."""
    state, _ = rows_state.prefill(target, prompts, max(len(p) + n for p, n in zip(prompts, limits, strict=True)))
    rows = [[] for _ in prompts]
    for step in decode.steps(target, state, keys, sample, (end,), limits):
        rows[step.row].append(step.token)
    return rows


# --- the text is the target's


@given(pairs(), st.sampled_from(SAMPLERS), st.integers(1, 5), st.integers(0, 99))
def test_the_text_is_the_targets_own_for_the_same_key(pair, settings, n, seed):
    prompts = [token_rows(pair[0].config, length, seed=seed).tolist() for length in (1, 5, 3)]
    keys, limits = lf.random.split(lf.random.key(seed), 3), [5, 2, 6]
    rows, *_ = written(*pair, prompts, keys, lf.narrowing(**settings), n, limits)
    assert rows == plainly(pair[0], prompts, keys, lf.sampler(**settings), limits)


@given(pairs(), st.lists(st.integers(1, 6), min_size=3, max_size=3), st.integers(1, 5), st.integers(0, 99),
       st.sampled_from([None, 1.5]))
def test_greedy_is_the_targets_own_greedy_text(pair, lengths, n, seed, penalty):
    prompts = [token_rows(pair[0].config, length, seed=seed + length).tolist() for length in lengths]
    keys, limits = lf.random.split(lf.random.key(seed), 3), [5, 2, 6]
    greedy = {"temperature": 0.0, "repetition_penalty": penalty}
    rows, *_ = written(*pair, prompts, keys, lf.narrowing(**greedy), n, limits)
    assert rows == plainly(pair[0], prompts, keys, lf.sampler(**greedy), limits)


@given(st.sampled_from([*SAMPLERS, {"temperature": 0.0}]), st.integers(1, 5), st.integers(0, 99))
def test_a_draft_that_is_the_target_is_accepted_and_tells_the_very_text(settings, n, seed):
    target, _ = small_pair()
    prompts = [token_rows(target.config, length, seed=seed).tolist() for length in (1, 5, 3)]
    keys, limits = lf.random.split(lf.random.key(seed), 3), [4, 7, 1]
    rows, proposed, accepted = written(target, target, prompts, keys, lf.narrowing(**settings), n, limits)
    assert rows == plainly(target, prompts, keys, lf.sampler(**settings), limits)
    assert accepted == proposed == [math.ceil((limit - 1) / (n + 1)) * n for limit in limits]


@given(st.integers(1, 4), st.integers(0, 99))
def test_a_row_is_what_it_would_be_alone(n, seed):
    pair = small_pair()
    prompts = [token_rows(pair[0].config, length, seed=seed).tolist() for length in (1, 5, 3)]
    keys, limits, narrow = lf.random.split(lf.random.key(seed), 3), [4, 0, 6], lf.narrowing(0.8)
    together, *counts = written(*pair, prompts, keys, narrow, n, limits)
    alone = [written(*pair, [prompts[i]], keys[i:i + 1], narrow, n, limits[i:i + 1]) for i in range(3)]
    assert together == [rows[0] for rows, *_ in alone] and [len(row) for row in together] == limits
    assert counts == [[proposed[0] for _, proposed, _ in alone], [accepted[0] for *_, accepted in alone]]


# --- one round


def test_the_accepted_mass_is_that_of_two_draws_by_one_noise():
    p, q = (lf.random.normal(lf.random.key(i), (7,)).mul(1.5).double().softmax(-1) for i in (1, 2))
    keys, places = lf.random.split(lf.random.key(0), 20_000), torch.full((20_000,), 11)
    chance = speculative.noise(keys, places, 1, 7, torch.float64)
    same = (p.log() + chance[:, 0]).argmax(-1) == (q.log() + chance[:, 0]).argmax(-1)
    each = 1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(-1)  # token x is both draws
    distance = (p - q).abs().sum() / 2
    assert each.sum() >= (1 - distance) / (1 + distance)  # Daliri et al. 2024
    assert p_value(torch.tensor([same.sum(), (~same).sum()]), torch.stack((each.sum(), 1 - each.sum()))) > 1e-6


@given(pairs(), st.sampled_from(SAMPLERS), st.integers(1, 4), st.integers(0, 99))
def test_the_state_after_a_rollback_is_that_of_a_fresh_prefill(pair, settings, n, seed):
    narrow, size = lf.narrowing(**settings), 40
    prompts = [token_rows(pair[0].config, length, seed=seed).tolist() for length in (1, 6, 3)]
    keys = lf.random.split(lf.random.key(seed), 3)
    state = speculative.begin(*pair, prompts, keys, narrow, size)
    for _ in range(3):
        before = state
        state, taken = speculative.advance(*pair, state, keys, narrow, n)
        assert (state.target.length == before.target.length + taken + 1).all() and (taken <= n).all()
    for row in range(3):
        tokens = state.tokens[row][:int(state.target.length[row]) + 1]
        assert tokens[:len(prompts[row])].tolist() == prompts[row]
        assert (tokens >= 0).all() and (state.tokens[row][len(tokens):] == -1).all()
        for params, cache, unseen in ((pair[0], state.target, 1), (pair[1], state.draft, 2)):
            known = len(tokens) - unseen
            assert int(cache.length[row]) == known
            fresh = lf.init_cache(params.config, max_len=size, dtype=torch.float64)
            if known:
                _, fresh = lf.forward(params, tokens[:known], fresh)
            held = lf.tree.map(lambda x: x[row], cache)  # noqa: B023
            for a, b in zip((*held.k, *held.v), (*fresh.k, *fresh.v), strict=True):
                assert known == 0 or (a[:, :known] - b[:, :known]).abs().max() < 1e-9
            (a, _), (b, _) = lf.forward(params, tokens[known:], held), lf.forward(params, tokens[known:], fresh)
            assert (a - b).abs().max() < 1e-9


# --- text


@pytest.fixture(scope="module")
def draft(tokenizer) -> lf.Model:
    """Another random model with the tokenizer of `model`."""
    config = lf.Config(dim=30, n_layers=2, n_heads=3, n_kv_heads=3, vocab_size=tokenizer.vocab_size, hidden_dim=41,
                       max_seq_len=96)
    return lf.Model(lf.init_params(lf.random.key(8), config), tokenizer)


@pytest.mark.parametrize(("seed", "n", "stop"), [(0, 1, ()), (1, 5, ("a",)), (2, 3, ("unseen", " t", "e")), (3, 4, ())])
def test_speculation_is_greedy_completion_with_its_stops_and_ends(model, draft, seed, n, stop):
    eos, key = model.tokenizer.eos_id, lf.random.key(seed)
    ends = model.params.output.clone()
    ends[eos] = 2.5 * lf.random.normal(key, ends[eos].shape) / math.sqrt(len(ends[eos]))  # it ends some texts early
    ending = lf.Model(model.params._replace(output=ends), model.tokenizer)
    prompts, settings = ["Once upon a time", "", "One"], {"key": key, "max_new_tokens": 12, "stop": stop}
    told = lf.speculate(ending, draft, prompts, n=n, narrow=lf.narrowing(0.0), **settings)
    plain = lf.text_completion(ending, prompts, sampler=lf.sampler(0.0), **settings)
    assert [(x.text, list(x.tokens)) for x in told] == [(x.text, x.tokens) for x in plain]
    assert all(0 <= x.accepted <= x.proposed and x.proposed % n == 0 for x in told)
    itself = lf.speculate(ending, ending, prompts, n=n, **settings)
    plain = lf.text_completion(ending, prompts, **settings)
    assert [(x.text, list(x.tokens), x.accepted) for x in itself] == [
        (y.text, y.tokens, x.proposed) for x, y in zip(itself, plain, strict=True)]
    assert sum(x.proposed for x in itself) > 0


@pytest.mark.parametrize(("seed", "n", "stop"), [(0, 1, ()), (1, 5, ("a",)), (2, 3, ("unseen", " t", "e")), (3, 4, ())])
def test_a_stream_of_speculation_joins_to_the_whole(model, draft, seed, n, stop):
    key, narrow = lf.random.key(seed), lf.narrowing(0.3)
    whole, = lf.speculate(model, draft, ["One"], key=key, n=n, max_new_tokens=12, narrow=narrow, stop=stop)
    pieces = list(lf.speculate_stream(model, draft, "One", key=key, n=n, max_new_tokens=12, narrow=narrow, stop=stop))
    *before, (last, told) = pieces
    assert "".join(piece for piece, _ in before) == whole.text == told.text and last == "" and all(x for x, _ in before)
    assert told.tokens[:len(whole.tokens)] == whole.tokens and told.proposed == whole.proposed
    for i, (_, so_far) in enumerate(pieces):
        assert so_far.text == "".join(piece for piece, _ in pieces[:i + 1])
        assert model.tokenizer.decode(so_far.tokens, continued=True).startswith(so_far.text)


@pytest.mark.parametrize("left", [1, 2, 3, 7])
def test_the_end_of_the_context_ends_the_text_and_nothing_overflows(model, draft, left):
    config = dataclasses.replace(model.params.config, max_seq_len=len(model.tokenizer.encode("Once upon")) + left)
    short = lf.Model(model.params._replace(config=config), model.tokenizer)
    told, = lf.speculate(short, draft, ["Once upon"], key=lf.random.key(0), n=5)
    assert len(told.tokens) == left


def test_the_shipped_draft_is_a_quarter_of_the_model_and_mostly_accepted():
    model, draft = lf.load("stories"), lf.load("stories-draft")
    assert draft.tokenizer == model.tokenizer and 4 * draft.params.config.n_params < model.params.config.n_params
    told = lf.speculate(model, draft, [""] * 20, key=lf.random.split(lf.random.key(2), 20), max_new_tokens=60)
    assert sum(x.accepted for x in told) > 0.93 * sum(x.proposed for x in told)  # 98 % of whole stories: the card


def test_bad_requests_are_refused_at_once(model, draft):
    key = lf.random.key(0)
    with pytest.raises(ValueError, match="n must be at least 1 proposed token a round, got 0"):
        lf.speculate_stream(model, draft, "a", key=key, n=0)
    config = dataclasses.replace(draft.params.config, vocab_size=400)
    small = draft._replace(params=lf.init_params(key, config))
    with pytest.raises(ValueError, match="the draft model has a vocabulary of 400 tokens, the model one of 401"):
        lf.speculate(model, small, ["a"], key=key)
    other = lf.train_tokenizer(["".join(map(chr, range(97, 123))), *["xy zz"] * 9], 286)
    with pytest.raises(ValueError, match="the draft model and the model have different tokenizers"):
        lf.speculate(model, draft._replace(tokenizer=other), ["a"], key=key)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, and the model's context is 96"):
        lf.speculate(model, draft, ["fine", "Once upon a time " * 40], key=key)
    with pytest.raises(ValueError, match="prompts is one text; put it in a list"):
        lf.speculate(model, draft, "a", key=key)
    with pytest.raises(ValueError, match="a stop string is empty"):
        lf.speculate_stream(model, draft, "a", key=key, stop=[""])
    with pytest.raises(ValueError, match="3 keys for 2 prompts"):
        lf.speculate(model, draft, ["a", "b"], key=lf.random.split(key, 3))
    broken = lf.Model(draft.params._replace(norm=draft.params.norm * math.nan), draft.tokenizer)
    with pytest.raises(ValueError, match="the draft's logits are NaN"):
        lf.speculate(model, broken, ["a"], key=key)
    with pytest.raises(ValueError, match="^(?!the draft).*the logits are NaN"):
        lf.speculate(broken, draft, ["a"], key=key)
    assert lf.speculate(model, draft, [], key=key) == []
    assert lf.speculate(model, draft, ["a"], key=key, max_new_tokens=0) == [lf.Speculation()]
