"""A step whose loss or gradient is not finite changes nothing; any other step is as it is without the guard."""

import math

import pytest
import torch
from folders import same
from hypothesis import given
from hypothesis import strategies as st
from runs import eager
from strategies import keys

import llama_fn as lf
from llama_fn.training import loop
from llama_fn.training.data import encode_corpus, open_corpus
from llama_fn.training.guarded import guarded
from llama_fn.training.jit_step import jit_step
from llama_fn.training.step import Metrics, make_step, make_update

CONFIG = lf.Config(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=11, hidden_dim=6, max_seq_len=16)
OPTIMIZER = lf.optim.adamw(1e-2)


def arguments(key, broken: float | None):
    init, drawn = lf.random.split(key)
    params = lf.init_params(init, CONFIG)
    opt_state = OPTIMIZER.init(params)
    if broken is not None:
        params = params._replace(norm=params.norm * broken)
    tokens = lf.random.bits(drawn, (2, 3, 5)) % CONFIG.vocab_size
    return params, opt_state, tokens, torch.ones_like(tokens, dtype=torch.bool)


@given(keys(), st.sampled_from([None, math.nan, math.inf]))
def test_a_step_is_taken_bit_for_bit_or_not_at_all(key, broken):
    step = make_step(OPTIMIZER)
    params, opt_state, tokens, mask = arguments(key, broken)
    new = guarded(step)(params, opt_state, tokens, mask)
    if broken is None:
        assert same(new, step(params, opt_state, tokens, mask)) and not same(new[0], params)
    else:
        assert same(new[:2], (params, opt_state)) and not new[2].loss.isfinite()


@given(st.booleans(), st.booleans())
def test_either_of_loss_and_gradient_is_reason_enough(loss, norm):
    def step(params, opt_state):
        return params + 1, opt_state + 1, Metrics(*(torch.tensor(0.0 if ok else math.nan) for ok in (loss, norm)),
                                                  torch.tensor(1))

    params, opt_state, _ = guarded(step)(torch.tensor(1.0), torch.tensor(2))
    assert (float(params), int(opt_state)) == ((2, 3) if loss and norm else (1, 2))


@pytest.mark.slow
def test_a_compiled_step_with_donation_keeps_what_it_took():
    for step in (lf.jit(guarded(make_step(OPTIMIZER)), donate=("params", "opt_state")),
                 jit_step(OPTIMIZER, update=lambda optimizer: guarded(make_update(optimizer)))):
        params, opt_state, tokens, mask = arguments(lf.random.key(0), math.nan)
        tokens, mask = tokens[:1], mask[:1]  # in one graph, another micro-batch takes as long again to compile
        before = lf.tree.map(torch.clone, (params, opt_state))
        for _ in range(2):
            params, opt_state, metrics = step(params, opt_state, tokens, mask)
            assert metrics.loss.isnan() and same((params, opt_state), before)
        params, opt_state, *_ = arguments(lf.random.key(0), None)
        before = lf.tree.map(torch.clone, (params, opt_state))
        assert not same(tuple(step(params, opt_state, tokens, mask)[:2]), before)


def test_some_steps_in_a_row_stop_a_run(tmp_path, monkeypatch, texts):
    eager(monkeypatch)
    tokenizer = lf.train_tokenizer(texts, 330)
    encode_corpus(texts, tokenizer, tmp_path / "train.bin")
    corpus = open_corpus(tmp_path / "train.bin", tokenizer, 12)
    params = lf.init_params(lf.random.key(0), CONFIG.__class__(**{**vars(CONFIG), "vocab_size": 330}))
    state = loop.init_state(params._replace(norm=params.norm * math.nan), OPTIMIZER)
    seen = []
    with pytest.raises(ValueError, match="step 3: the loss is nan and the gradient's norm nan, not finite for 3 steps"):
        for new, _ in loop.train(state, OPTIMIZER, corpus, lf.random.key(0), 9, (1, 2), most_skipped=3):
            seen.append(int(new.step))
            assert same(new[:2], state[:2]) and loop.updates_taken(new.opt_state) == 0
    assert seen == [1, 2]
    broken = iter([True, True, False, True, True, False, False, False, False])  # never three in a row

    def sometimes(optimizer, **options):
        step = make_step(optimizer)
        return guarded(lambda params, *rest: step(params._replace(norm=params.norm * math.nan) if next(broken)
                                                  else params, *rest))

    monkeypatch.setattr(loop, "jit_step", sometimes)
    state = loop.init_state(params, OPTIMIZER)
    *_, (state, _) = loop.train(state, OPTIMIZER, corpus, lf.random.key(0), 9, (1, 2), most_skipped=3)
    assert (int(state.step), loop.updates_taken(state.opt_state)) == (9, 5)
