"""Generation from tokens: the text's own loop without a tokenizer, with layers and heads of one's own."""

import math

import pytest
import torch
from dialogs import plays, talker
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys, models, token_rows

import llama_fn as lf
from llama_fn.compiled import decoding


def by_hand(params: lf.Params, row: list[int], key, sample, count: int, ends=(), **parts) -> tuple[list, list]:
    """The tokens after a row and their log-probabilities, by `forward` again and again."""
    tokens, nats = list(row), []
    while len(tokens) < min(len(row) + count, params.config.max_seq_len):
        logits, _ = lf.forward(params, torch.tensor(tokens), **parts)
        token = int(sample(lf.random.fold_in(key, len(tokens)), logits[-1], torch.tensor(tokens)))
        if token in ends:
            break
        nats.append(float(logits[-1].float().log_softmax(-1)[token]))
        tokens.append(token)
    return tokens[len(row):], nats


@given(models(max_layers=2), keys(), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 9),
       st.sets(st.integers(0, 10), max_size=3), st.booleans())
def test_generation_is_forward_and_sampler_again_and_again(params, key, lengths, count, stop_ids, own_keys):
    rows = [token_rows(params.config, length, seed=i).tolist() for i, length in enumerate(lengths)]
    each = lf.random.split(key, len(rows)) if own_keys else key.expand(len(rows), 2)
    sample = lf.sampler(0.9, top_k=9, repetition_penalty=1.2)
    told = lf.generate(params, rows, key=each if own_keys else key, max_new_tokens=count, sampler=sample,
                       stop_ids=stop_ids, logprobs=True)
    for row, key, (tokens, nats) in zip(rows, each, told, strict=True):
        expected = by_hand(params, row, key, sample, count, stop_ids)
        assert tokens == expected[0] and nats == pytest.approx(expected[1], abs=1e-5)


def test_rows_may_be_a_tensor_or_of_tensors_and_no_log_probabilities_are_none(model):
    rows = token_rows(model.params.config, 3, 5)
    own = {"key": lf.random.key(1), "max_new_tokens": 4}
    told = lf.generate(model.params, rows, **own)
    assert told == lf.generate(model.params, rows.tolist(), **own) == lf.generate(model.params, list(rows), **own)
    assert [x.logprobs for x in told] == [None] * 3 and [len(x.tokens) for x in told] == [4] * 3
    assert lf.generate(model.params, [], **own) == lf.generate(model.params, rows[:0], **own) == []


@given(keys(), st.integers(0, 9))
def test_a_texts_completion_is_the_generation_of_its_tokens(model, key, count):
    prompts = ["Once upon a time", "", "One"]
    texts = lf.text_completion(model, prompts, key=key, max_new_tokens=count, logprobs=True)
    told = lf.generate(model.params, [model.tokenizer.encode(prompt) for prompt in prompts], key=key,
                       max_new_tokens=count, stop_ids=[model.tokenizer.eos_id], logprobs=True)
    assert [(x.tokens, x.logprobs) for x in told] == [(x.tokens, x.logprobs) for x in texts]


def test_a_row_ends_before_any_of_the_stop_tokens_and_with_the_context(tokenizer):
    model = talker(tokenizer, 12)
    script = [70, 71, 72, 73]
    for stop_ids, expected in (((), script), ([72], script[:2]), ((99, 73, 71), script[:1]), ({70}, [])):
        told, = lf.generate(model.params, [[1, 5]], key=lf.random.key(0), max_new_tokens=4, stop_ids=stop_ids,
                            sampler=plays(script, 2))
        assert told.tokens == expected
    whole, = lf.generate(model.params, [[1, 5]], key=lf.random.key(0))
    assert len(whole.tokens) == 10


@given(models(max_layers=2), keys())
def test_layer_and_head_of_ones_own_are_those_of_every_token(params, key):
    def louder(weights, x, *rest):
        x, cache = lf.block(weights, x, *rest)
        return x + 0.3 * x.sign(), cache

    def colder(*args):
        return 0.4 * lf.head(*args)

    rows, parts = [token_rows(params.config, n, seed=n).tolist() for n in (5, 2)], {"layer": louder, "head": colder}
    told = lf.generate(params, rows, key=key, max_new_tokens=6, logprobs=True, **parts)
    for row, (tokens, nats) in zip(rows, told, strict=True):
        expected = by_hand(params, row, key, lf.sampler(), 6, **parts)
        assert tokens == expected[0] and nats == pytest.approx(expected[1], abs=1e-5)


def test_texts_and_streams_hand_on_layer_and_head(model):
    asked = []

    def noted(weights, x, *rest):
        asked.append(x.shape[-2])
        return lf.block(weights, x, *rest)

    def only(*args):
        logits = lf.head(*args)
        return logits.masked_fill(torch.arange(logits.shape[-1]) != 70, -math.inf)

    own = {"key": lf.random.key(0), "max_new_tokens": 3, "layer": noted, "head": only}
    told, = lf.text_completion(model, ["One"], **own)
    assert told.tokens == [70] * 3 and len(asked) == 3 * len(model.params.blocks)
    asked.clear()
    assert "".join(lf.stream(model, "One", **own)) == told.text and len(asked) == 3 * len(model.params.blocks)


@pytest.mark.slow
def test_adapters_go_through_a_layer_of_ones_own_and_compiled_steps(model, monkeypatch):
    adapters = lf.tree.map(lambda *xs: torch.stack(xs), *(
        lf.random.like(lf.random.key(i), lf.lora.init(lf.random.key(0), model.params, rank=2)) for i in range(2)))
    rows, own = [[1, 5, 6], [1, 7]], {"key": lf.random.key(0), "max_new_tokens": 4, "adapters": adapters}
    plain = lf.generate(model.params, rows, **own)
    assert lf.generate(model.params, rows, layer=lambda *args: lf.block(*args), **own) == plain
    monkeypatch.setattr(decoding, "LARGE", 0)
    assert lf.generate(model.params, rows, **own) == plain

    def strange(key, logits, tokens):
        return lf.sampler()(key, logits, tokens)

    assert lf.generate(model.params, rows, sampler=strange, **own) == plain


def test_bad_requests_are_refused_at_once(model):
    key, params = lf.random.key(0), model.params
    with pytest.raises(ValueError, match=r"`prompts(.0)?` should be"):
        lf.generate(params, [1, 2, 3], key=key)
    with pytest.raises(ValueError, match=r"`prompts(.0)?` should be"):
        lf.generate(params, torch.tensor([1, 2, 3]), key=key)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        lf.generate(params, [[1], []], key=key)
    with pytest.raises(ValueError, match="token 401 is outside the vocabulary of 401 tokens"):
        lf.generate(params, [[1, 401]], key=key)
    with pytest.raises(ValueError, match=f"token {2**70} is outside the vocabulary of 401 tokens"):
        lf.generate(params, [[1], [2, 2**70]], key=key)
    with pytest.raises(ValueError, match="the prompt has 96 tokens, and the model's context is 96"):
        lf.generate(params, [[1] * 96], key=key)
    with pytest.raises(ValueError, match="3 keys for 1 prompts"):
        lf.generate(params, [[1]], key=lf.random.split(key, 3))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        lf.generate(params, [[1]], key=key, max_new_tokens=-1)
