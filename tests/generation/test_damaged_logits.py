"""Logits that no token can be drawn from: one error, wherever a token is drawn; and a mask of -inf is no damage."""

import dataclasses
import math

import pytest
import torch
from dialogs import dialog
from example import functions
from hypothesis import example, given
from hypothesis import strategies as st
from program import cli
from strategies import keys

import llama_fn as lf
from llama_fn.compiled.inductor import MANY_ROUNDS
from llama_fn.compiled.layers import by_shape
from llama_fn.generation import decode
from llama_fn.generation.sampling import drawable

REMEDY = (r"the logits are NaN or infinite \(\+inf, or -inf for every token\): .* overflowed in a 16-bit dtype; "
          "load the model in bfloat16 or float32")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SETTINGS = [{}, {"temperature": 0.0}, {"temperature": 1e-30}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.9},
            {"top_p": 1e-12}, {"min_p": 0.2}, {"min_p": 1.0}, {"repetition_penalty": 1.3},
            {"temperature": 0.7, "top_k": 4, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.6}]
TOKENS = torch.tensor([2, 0, -1, 2])

numbers = st.floats(width=16) | st.sampled_from([math.inf, -math.inf, math.nan, 65504.0, -65504.0, 0.0, -0.0])
rows = st.lists(numbers | st.floats(-9, 9, width=16) | st.just(-math.inf), min_size=1, max_size=7)


def plainly_drawable(logits: list[float]) -> bool:
    return not any(map(math.isnan, logits)) and math.inf not in logits and set(logits) != {-math.inf}


def damaged(model: lf.Model, value: float, which: slice) -> lf.Model:
    """The model with logits of a value, of all tokens or some, once its prompt has two tokens or more."""
    output = model.params.output.clone()
    output[which] = value
    return model._replace(params=model.params._replace(output=output))


@given(rows, st.sampled_from(DTYPES), st.sampled_from(SETTINGS), keys())
@example([-math.inf, -math.inf], torch.float32, {"top_p": 0.9}, lf.random.key(0))
@example([-math.inf, 0.0], torch.float16, {"top_p": 0.9}, lf.random.key(0))
@example([math.inf, 0.0], torch.float32, {}, lf.random.key(0))
@example([65504.0, -65504.0], torch.float16, {"temperature": 1e-30}, lf.random.key(0))
def test_any_logits_give_a_token_of_positive_probability_or_the_one_error(logits, dtype, settings, key):
    sample, row = lf.sampler(**settings), torch.tensor(logits, dtype=torch.float64).to(dtype)
    tokens = TOKENS.where(len(logits) > TOKENS, -1)
    mapped = torch.vmap(sample)(key[None], row[None], tokens[None]).item()
    assert bool(drawable(row)) == plainly_drawable(row.tolist())
    if not plainly_drawable(row.tolist()):
        for draw in (sample, lf.narrowing(**settings)):
            with pytest.raises(ValueError, match=f"sample: {REMEDY}"):
                draw(*(key,) * (draw is sample), row, tokens)
        assert mapped == -1  # which no model takes
        return
    drawn = int(sample(key, row, tokens))
    assert mapped == drawn and 0 <= drawn < len(logits) and row[drawn] > -math.inf
    assert lf.narrowing(**settings)(row, tokens).softmax(-1)[drawn] > 0


@pytest.mark.slow
def test_compiled_a_draw_is_a_value_and_of_damaged_logits_no_token():
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    logits[1, 3], logits[2, 4], logits[3], logits[4, :6], logits[5, 0] = math.nan, math.inf, -math.inf, -math.inf, -9e9
    keys, lengths = lf.random.split(lf.random.key(1), 9), torch.arange(9)
    args = (logits, lengths, torch.full((9, 4), -1), keys, lf.sampler(top_p=0.9))
    drawn, compiled = decode.drawn(*args), by_shape(decode.drawn, cpu=MANY_ROUNDS)(*args)
    assert torch.equal(drawn, compiled) and (drawn < 0).nonzero().flatten().tolist() == [1, 2, 3] and drawn[4] == 6


@pytest.mark.parametrize(("value", "which"), [(math.nan, slice(9, 10)), (math.inf, slice(3)), (-math.inf, slice(None))])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 2}, {"min_p": 0.1}])
def test_every_way_to_draw_says_the_same(model, value, which, settings):
    broken, key = damaged(model, value, which), lf.random.key(0)
    sample, narrow = lf.sampler(**settings), lf.narrowing(**settings)
    own = {"key": key, "max_new_tokens": 4, "sampler": sample}
    hello = dialog(None, [], "hello")

    def strange(key, logits, tokens=None):  # a sampler of one's own, which looks at nothing
        return torch.zeros(logits.shape[:-1], dtype=torch.int64)

    for draw in (lambda: lf.text_completion(broken, ["One", ""], **own), lambda: list(lf.stream(broken, "One", **own)),
                 lambda: lf.text_completion(broken, ["One"], **own | {"sampler": strange}),
                 lambda: lf.chat_completion(broken, [hello], **own),
                 lambda: list(lf.answer(broken, lf.ask(broken, lf.Chat(), "hello"), **own)),
                 lambda: lf.speculate(broken, model, ["One"], key=key, n=2, narrow=narrow),
                 lambda: lf.speculate(broken, model, ["One"], key=key, n=2, narrow=lambda logits, tokens: logits),
                 lambda: list(lf.speculate_stream(broken, model, "One", key=key, n=2, narrow=narrow))):
        with pytest.raises(ValueError, match=REMEDY):
            draw()
    with pytest.raises(ValueError, match=REMEDY.replace("the logits", "the draft's logits")):
        lf.speculate(model, broken, ["One"], key=key, n=2, narrow=narrow)


@pytest.mark.parametrize(("value", "which"), [(math.nan, slice(9, 10)), (math.inf, slice(3)), (-math.inf, slice(None))])
def test_every_score_says_it_too(model, value, which):
    broken = damaged(model, value, which)
    for score in (lambda: lf.score(broken, ["One day", ""]), lambda: lf.score(broken, [" day"], prefixes=["One"]),
                  lambda: lf.score_options(broken, "One", [" day", " two"]), lambda: lf.perplexity(broken, "One day")):
        with pytest.raises(ValueError, match=REMEDY):
            score()


def test_damage_that_comes_later_is_found_when_it_comes(model):
    key, plain = lf.random.key(0), lambda logits, tokens: logits  # a narrowing of one's own, which looks at nothing
    told, = lf.text_completion(model, ["One"], key=key, max_new_tokens=2)
    embedding = model.params.embedding.clone()
    embedding[told.tokens[0]] = math.nan
    broken = model._replace(params=model.params._replace(embedding=embedding))
    assert lf.text_completion(broken, ["One"], key=key, max_new_tokens=1)[0].tokens == told.tokens[:1]
    assert lf.speculate(broken, broken, ["One"], key=key, max_new_tokens=1)[0].tokens == (told.tokens[0],)
    with pytest.raises(ValueError, match=REMEDY):
        lf.text_completion(broken, ["One"], key=key, max_new_tokens=2)
    for narrow in (plain, lf.narrowing(top_p=0.9), lf.narrowing()):
        with pytest.raises(ValueError, match="^(sample: )?" + REMEDY):
            lf.speculate(broken, model, ["One"], key=key, max_new_tokens=2, narrow=narrow)
        with pytest.raises(ValueError, match="^" + REMEDY.replace("the logits", "the draft's logits")):
            lf.speculate(model, broken, ["One"], key=key, max_new_tokens=2, narrow=narrow)
    first = damaged(model, math.inf, slice(3))
    with pytest.raises(ValueError, match=REMEDY):
        lf.speculate(first, model, ["One"], key=key, max_new_tokens=1, narrow=plain)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_searches_say_it_too(model, value):
    params, prompt = damaged(model, value, slice(9, 10)).params, torch.tensor([1, 5, 6])
    for search in (lambda: functions("beam_search").beam_search(params, prompt, 2, 3),
                   lambda: functions("tree_search").likeliest(params, [1, 5, 6], 2),
                   lambda: functions("speculate").greedy(params, model.params, [1, 5, 6], 2, 3),
                   lambda: functions("speculate").greedy(model.params, params, [1, 5, 6], 2, 3),
                   lambda: functions("best_of_n").continuations(params, prompt, lf.random.key(0)[None], 2, 2)):
        with pytest.raises(ValueError, match=REMEDY):
            search()


def test_a_mask_of_some_tokens_is_no_damage(model):
    only = [70, 75, 80]

    def masked(key, logits, tokens):
        kept = torch.full_like(logits, -math.inf).index_copy(-1, torch.tensor(only), logits[torch.tensor(only)])
        return lf.sampler(top_p=0.9)(key, kept, tokens)

    told, = lf.text_completion(model, ["One"], key=lf.random.key(0), max_new_tokens=9, sampler=masked)
    assert set(told.tokens) <= set(only) and len(told.tokens) == 9


@pytest.mark.parametrize("arguments", [["--top-p", "0.9"], ["--greedy"], ["--top-k", "3"], ["--min-p", "0.1"], []])
def test_on_the_command_line_an_overflow_is_one_line(monkeypatch, capsys, tmp_path, model, arguments):
    config = dataclasses.replace(model.params.config)
    large = lf.tree.map(lambda x: x * 3e4 if x.ndim > 1 else x, model.params)._replace(config=config)
    lf.save(model._replace(params=large), tmp_path / "large")
    status, out, err = cli(monkeypatch, capsys, "generate", "One", "--model", str(tmp_path / "large"), "--dtype",
                           "float16", *arguments)
    said = [line for line in err.splitlines() if line.startswith("llama-fn")]
    assert status == 2 and len(said) == 1 and "NaN or infinite" in said[0] and "bfloat16 or float32" in said[0], err
    assert out.strip() == "One"
