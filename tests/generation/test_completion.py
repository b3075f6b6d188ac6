"""Completion: a row is what it would be alone, a stream joins to the whole, and texts end where they should."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import keys

import llama_fn as lf
from llama_fn.generation import decode
from llama_fn.generation import state as rows_state
from llama_fn.generation.sampling import penalize
from llama_fn.generation.stop_strings import until
from llama_fn.ops import room as kv

PROMPTS = ["Once upon a time", "Long ago there was a brave little girl", "", "One"]


@given(st.integers(0, 99), st.permutations(range(4)), st.booleans())
def test_a_row_is_what_it_would_be_alone(model, seed, order, one_key):
    keys = lf.random.key(seed) if one_key else lf.random.split(lf.random.key(seed), 4)
    prompts = [PROMPTS[i] for i in order]
    together = lf.text_completion(model, prompts, key=keys, max_new_tokens=12, echo=True, logprobs=True)
    for i, (prompt, completion) in enumerate(zip(prompts, together, strict=True)):
        key = keys if one_key else keys[i]
        alone, = lf.text_completion(model, [prompt], key=key, max_new_tokens=12, echo=True, logprobs=True)
        assert alone.tokens == completion.tokens and alone.text == completion.text
        assert alone.logprobs == pytest.approx(completion.logprobs, abs=1e-4)


@given(st.integers(0, 99), st.sampled_from(PROMPTS))
def test_completion_is_forward_and_sampler_again_and_again(model, seed, prompt):
    key, sample = lf.random.key(seed), lf.sampler(0.9, top_k=50)
    tokens = model.tokenizer.encode(prompt)
    for _ in range(8):
        logits, _ = lf.forward(model.params, torch.tensor(tokens))
        tokens.append(int(sample(lf.random.fold_in(key, len(tokens)), logits[-1])))
        if tokens[-1] == model.tokenizer.eos_id:
            break
    completion, = lf.text_completion(model, [prompt], key=key, max_new_tokens=8, sampler=sample, echo=True)
    assert completion.tokens == [id for id in tokens if id != model.tokenizer.eos_id]


@given(st.integers(0, 99), st.sampled_from(PROMPTS), st.integers(0, 30))
def test_a_stream_joins_to_the_completion(model, seed, prompt, count):
    key = lf.random.key(seed)
    completion, = lf.text_completion(model, [prompt], key=key, max_new_tokens=count, echo=True)
    pieces = list(lf.stream(model, prompt, key=key, max_new_tokens=count))
    assert prompt + "".join(pieces) == completion.text == model.tokenizer.decode(completion.tokens)
    assert all(pieces)


@pytest.mark.slow
@given(st.integers(0, 99), st.sampled_from(PROMPTS), st.integers(0, 20), st.integers(1, 6))
def test_a_stop_string_ends_the_text_before_it(model, seed, prompt, start, size):
    key = lf.random.key(seed)
    free, = lf.text_completion(model, [prompt], key=key, max_new_tokens=30)
    stop = free.text[start:start + size] or "never"
    stopped, = lf.text_completion(model, [prompt], key=key, max_new_tokens=30, stop=["unseen", stop])
    assert stopped.text == free.text.split(stop)[0]
    assert stopped.tokens == free.tokens[:len(stopped.tokens)]
    assert "".join(lf.stream(model, prompt, key=key, max_new_tokens=30, stop=["unseen", stop])) == stopped.text


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_until_cuts_at_the_first_stop_however_the_text_is_cut_in_pieces(pieces, stop):
    # A stop is seen when its piece is there: of two that overlap, the one that is complete first wins.
    text = "".join(pieces)
    ends = [i for i in range(len(text) + 1) if any(s in text[:i] for s in stop)]
    one_by_one = "".join(until(text, stop))
    expected = text if not ends else min((text[:text.find(s)] for s in stop if s in text[:ends[0]]), key=len)
    assert one_by_one == expected
    whole = "".join(until([text], stop))
    assert whole == (min((text[:text.find(s)] for s in stop if s in text), key=len) if ends else text)
    assert "".join(until(pieces, stop)) in text and text.startswith("".join(until(pieces, stop)))


def test_the_end_token_ends_a_text_and_is_not_part_of_it(model):
    eos, blocked = model.tokenizer.eos_id, model.params.output.clone()
    params = model.params._replace(norm=model.params.norm * 0 + 1, output=blocked * 0)
    always = lf.Model(params, model.tokenizer)

    def end_at_once(key, logits, tokens=None):
        return torch.full(logits.shape[:-1], eos)

    def end_third(key, logits, tokens):
        return torch.where((tokens >= 0).sum(-1) == len(model.tokenizer.encode("One")) + 2, eos, 70)

    completion, = lf.text_completion(always, ["One"], key=lf.random.key(0), sampler=end_at_once, logprobs=True)
    assert completion == lf.Completion("", [], [])
    completion, = lf.text_completion(always, ["One"], key=lf.random.key(0), sampler=end_third, logprobs=True)
    assert completion.tokens == [70, 70]
    assert completion.logprobs == pytest.approx([-math.log(model.tokenizer.vocab_size)] * 2, abs=1e-5)


@given(st.integers(0, 99))
def test_logprobs_are_the_models_own(model, seed):
    narrowed = lf.sampler(0.5, top_k=3)
    completion, = lf.text_completion(model, [PROMPTS[1]], key=lf.random.key(seed), max_new_tokens=9, sampler=narrowed,
                                     echo=True, logprobs=True)
    logits, _ = lf.forward(model.params, torch.tensor(completion.tokens))
    nats = logits.log_softmax(-1)
    expected = [0.0] + [float(nats[i, id]) for i, id in enumerate(completion.tokens[1:])]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_text_ends_with_the_context_and_rows_end_on_their_own(model):
    context = model.params.config.max_seq_len
    eos = model.tokenizer.eos_id

    def never_end(key, logits, tokens):
        return logits.index_fill(-1, torch.tensor(eos), -math.inf).argmax(-1)

    completions = lf.text_completion(model, PROMPTS, key=lf.random.key(0), sampler=never_end, echo=True)
    assert [len(c.tokens) for c in completions] == [context] * 4
    short = lf.text_completion(model, PROMPTS, key=lf.random.key(0), sampler=never_end, max_new_tokens=3)
    assert [c.tokens for c in short] == [c.tokens[len(model.tokenizer.encode(p)):][:3]
                                         for c, p in zip(completions, PROMPTS, strict=True)]


@given(keys())
def test_a_forked_row_goes_on_as_if_alone(model, key):
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    state, _ = rows_state.prefill(model.params, prompts, 40)
    forked, sample = rows_state.select(state, [2, 0, 2]), lf.sampler()
    each = lf.random.split(key, 3)
    token = decode.draw(forked, each, sample)
    after = rows_state.advance(model.params, forked, token)
    for i, row in enumerate([2, 0, 2]):
        logits, _ = lf.forward(model.params, torch.tensor([*prompts[row], int(token[i])]))
        assert (after.logits[i] - logits[-1]).abs().max() < 1e-4


@given(st.integers(0, 40), st.integers(1, 60), st.integers(0, 9))
@example(known=40, slots=60, more=0)  # all of it
def test_a_text_goes_on_from_the_cache_of_any_beginning(model, known, slots, more):
    ids = model.tokenizer.encode("Long ago there was a brave little girl")
    known = min(known, len(ids), slots)
    cache = lf.init_cache(model.params.config, (1,), max_len=slots)
    if known:
        _, cache = lf.forward(model.params, torch.tensor([ids[:known]]), cache)
    before = lf.tree.map(torch.clone, cache)
    state = rows_state.resume(model.params, ids, cache, len(ids) + more)
    logits, _ = lf.forward(model.params, torch.tensor(ids))
    assert (state.logits[0] - logits[-1]).abs().max() < 1e-4 and int(state.cache.length) == len(ids)
    room = state.tokens.shape[-1]
    assert state.tokens[0].tolist() == ids + [-1] * (room - len(ids))
    assert max(slots, len(ids) + more) <= room <= max(slots, len(ids) + more + kv.PAGE)
    assert state.cache.k[0].shape[-2] == state.cache.v[-1].shape[-2] == state.tokens.shape[-1]
    assert all(torch.equal(*pair) for pair in zip(lf.tree.leaves(cache), lf.tree.leaves(before), strict=True))


def test_a_repetition_penalty_sees_prompt_and_answer(model):
    tokens = model.tokenizer.encode("Once upon a time")
    completion, = lf.text_completion(model, ["Once upon a time"], key=lf.random.key(0), echo=True, max_new_tokens=20,
                                     sampler=lf.sampler(0.0, repetition_penalty=1.5))
    for _ in range(20):
        logits, _ = lf.forward(model.params, torch.tensor(tokens))
        tokens.append(int(penalize(logits[-1], torch.tensor(tokens), 1.5).argmax()))
    assert completion.tokens == tokens


def test_bad_requests_are_refused_at_once(model):
    key = lf.random.key(0)
    context, text = model.params.config.max_seq_len, "Once upon a time " * 40
    count = len(model.tokenizer.encode(text))
    message = f"the prompt has {count} tokens, and the model's context is {context}"
    with pytest.raises(ValueError, match=message):
        lf.text_completion(model, ["fine", text], key=key)
    with pytest.raises(ValueError, match=message):
        lf.stream(model, text, key=key)
    with pytest.raises(ValueError, match="3 keys for 2 prompts; give one for all, or one for each"):
        lf.text_completion(model, ["a", "b"], key=lf.random.split(key, 3))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        lf.text_completion(model, ["a"], key=key, max_new_tokens=-1)
    with pytest.raises(ValueError, match="a stop string is empty"):
        lf.stream(model, "a", key=key, stop=[""])
    with pytest.raises(ValueError, match="stop is one string; put it in a list"):
        lf.stream(model, "a", key=key, stop="The end.")
    with pytest.raises(ValueError, match="prompts is one text; put it in a list"):
        lf.text_completion(model, "a", key=key)
    with pytest.raises(ValueError, match=r"character 1 is the lone surrogate U\+D800"):
        lf.text_completion(model, ["a\ud800"], key=key)
    with pytest.raises(ValueError, match="prompt 1 is empty: a model needs a token to go on from"):
        rows_state.prefill(model.params, [[1], []], 9)
    with pytest.raises(ValueError, match="prompt 0 has 3 tokens, the cache room for 2"):
        rows_state.prefill(model.params, [[1, 2, 3], [1]], 2)
    broken = lf.Model(model.params._replace(norm=model.params.norm * math.nan), model.tokenizer)
    with pytest.raises(ValueError, match="the logits are NaN"):
        lf.text_completion(broken, ["a"], key=key)
    state, _ = rows_state.prefill(broken.params, [[1]], 9)
    with pytest.raises(ValueError, match="the logits are NaN"):  # with no end token, too
        next(decode.steps(broken.params, state, key[None], lf.sampler(), (), [4]))
    assert lf.text_completion(model, [], key=key) == []


def test_a_prompt_goes_through_in_chunks(model, monkeypatch):
    prompts = [[1, 5, 6, 7, 8, 9, 10, 11], [1, 5], [1, 7, 8]]

    def both():
        state, logits = rows_state.prefill(model.params, prompts, 12)
        return state, [state.logits, logits, rows_state.resume(model.params, prompts[0], None, 12).logits]

    whole, expected = both()
    assert (expected[2] - expected[0][:1]).abs().max() < 1e-5
    monkeypatch.setattr(rows_state, "CHUNK", 3)
    state, logits = both()
    assert max(float((a - b).abs().max()) for a, b in zip(logits, expected, strict=True)) < 1e-5
    assert state.cache.length.tolist() == [8, 2, 3]
    step, after = (rows_state.advance(model.params, x, torch.tensor([4, 4, 4])).logits for x in (state, whole))
    assert (step - after).abs().max() < 1e-5
