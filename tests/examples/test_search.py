"""The examples that search: each is held against all that there is to find, on small random models."""

import itertools
import math
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, keys, random_params, token_rows

import llama_fn as lf

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name: str, function: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))[function]


@st.composite
def small_models(draw, vocab_size: int = 5) -> lf.Params:
    return random_params(draw(configs(vocab_size, max_layers=2)), draw(keys()))


def all_texts(params: lf.Params, prompt: list[int], depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every text of `depth` tokens, and its log-probability after the prompt."""
    texts = torch.tensor(list(itertools.product(range(params.config.vocab_size), repeat=depth)))
    whole = torch.cat((torch.tensor(prompt).expand(len(texts), -1), texts), 1)
    logits, _ = lf.forward(params, whole[:, :-1])
    nats = logits.log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
    return texts, nats[:, len(prompt) - 1:].sum(-1)


def greedy(params: lf.Params, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        logits, _ = lf.forward(params, torch.tensor(text))
        text.append(int(logits[-1].argmax()))
    return text[len(prompt):]


@given(small_models(), st.integers(1, 4), st.integers(0, 9))
def test_a_beam_as_wide_as_all_beginnings_finds_the_likeliest_text(params, depth, seed):
    prompt = token_rows(params.config, 3, seed=seed)
    texts, exact = all_texts(params, prompt.tolist(), depth)
    told, nats = example("beam_search", "beam_search")(params, prompt, 5 ** (depth - 1), depth)
    order = exact.argsort(descending=True)[:len(told)]
    assert told.tolist() == texts[order].tolist() and (nats - exact[order]).abs().max() < 1e-9


@given(small_models(), st.integers(1, 5), st.integers(1, 5))
def test_a_beam_of_one_is_greedy_and_a_wider_one_tells_its_log_probabilities(params, width, depth):
    prompt, beam_search = token_rows(params.config, 4), example("beam_search", "beam_search")
    assert beam_search(params, prompt, 1, depth)[0].tolist() == [greedy(params, prompt.tolist(), depth)]
    told, nats = beam_search(params, prompt, width, depth)
    logits, _ = lf.forward(params, torch.cat((prompt.expand(len(told), -1), told), 1))
    exact = logits[:, 3:-1].log_softmax(-1).gather(-1, told[..., None])[..., 0].sum(-1)
    assert (nats - exact).abs().max() < 1e-9 and (nats.diff() <= 0).all()
    assert len(set(map(tuple, told.tolist()))) == min(width, 5**depth)


@given(small_models(), st.integers(1, 4), st.integers(0, 9))
def test_best_first_search_finds_the_likeliest_text_of_all(params, depth, seed):
    prompt = token_rows(params.config, 3, seed=seed).tolist()
    texts, exact = all_texts(params, prompt, depth)
    told, nats, computed = example("tree_search", "likeliest")(params, prompt, depth)
    assert told == texts[exact.argmax()].tolist() and nats == pytest.approx(float(exact.max()), abs=1e-9)
    assert len(prompt) + depth - 1 <= computed < len(prompt) + depth * 5**depth


@given(small_models(11), keys())
def test_continuations_are_those_of_each_key_alone(params, key):
    prompt, count, end = token_rows(params.config, 3), 4, 2
    each = lf.random.split(key, 3)
    told, nats = example("best_of_n", "continuations")(params, prompt, each, count, end)
    for row in range(3):
        text, total, going = prompt.tolist(), 0.0, True
        for _ in range(count):
            logits, _ = lf.forward(params, torch.tensor(text))
            text.append(int(lf.sampler()(lf.random.fold_in(each[row], len(text)), logits[-1])))
            total += float(logits[-1].log_softmax(-1)[text[-1]]) * going
            going = going and text[-1] != end
        assert told[row].tolist() == text[3:] and float(nats[row]) == pytest.approx(total, abs=1e-9)


@given(small_models(11), small_models(11), st.integers(1, 5), st.integers(1, 9))
def test_speculation_by_hand_is_greedy_and_a_perfect_draft_saves_passes(params, draft, n, count):
    prompt, by_hand = token_rows(params.config, 3).tolist(), example("speculate", "greedy")
    told, passes = by_hand(params, draft, prompt, n, count)
    assert told == greedy(params, prompt, count) and passes <= count
    assert by_hand(params, params, prompt, n, count) == (told, math.ceil(count / (n + 1)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("best_of_n", "likeliest of 16"), ("beam_search", "width 16"),
                                                ("tree_search", "10 tokens, log p"), ("speculate", "60 tokens in ")])
def test_the_examples_tell_stories(name, expected, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "Long ago there was a brave little"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert expected in out and "Long ago there was a brave little girl named" in out
