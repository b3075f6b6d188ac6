"""`llama-fn bench`: what it prints is what it measured."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from program import cli

from llama_fn.bench import ceiling
from llama_fn.bench.startup import seconds_to_first_token
from llama_fn.bench.timing import Ratio, interleave, quartiles, ratio
from llama_fn.bench.transforms import peak_bytes
from llama_fn.bench.work import Work

seconds = st.lists(st.floats(1e-6, 1e3), min_size=3, max_size=12)


@given(seconds)
def test_quartiles_are_numpys(values):
    assert quartiles(values) == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]).tolist(), rel=1e-12)


@given(seconds, st.floats(0.1, 10))
def test_a_ratio_is_that_of_the_rounds_however_unlike_they_are(values, factor):
    assert ratio([factor * x for x in values], values) == pytest.approx((factor,) * 3)


def test_a_ratio_of_rounds_too_far_apart_is_none():
    assert str(Ratio(1.2, 1.0, 1.4)) == "1.20 (1.00 to 1.40)" and str(Ratio(1.2, 1.0, 1.6)) == "unclear: 1.00 to 1.60"


def test_works_take_turns_after_two_rounds_to_warm_up():
    calls = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert "".join(calls) == "ab" * 5 and {name: len(seen) for name, seen in times.items()} == {"a": 3, "b": 3}


def test_a_peak_counts_what_is_held_at_once():
    def work():
        x = torch.ones(2**18)  # 1 MiB
        del x
        return torch.ones(2**17) + torch.ones(2**17)  # 3 halves

    assert peak_bytes(work) == 3 * 2**19


def test_bad_input_is_named(monkeypatch, capsys):
    for args, message in {
        ("transforms", "--only", "prompt"): "bench: there is no measurement 'prompt', only samples, prompts, adapters",
        ("checks", "--rounds", "2"): "bench: quartiles need 3 rounds or more, got 2",
        ("decode", "--shape", "stories", "--context", "9", "--max-len", "9"):
            "bench: a context must lie between 0 and max_len = 9, got 9",
        ("decode", "--shape", "small", "--compare", "gpt-fast"):
            "bench: gpt-fast is not found; name a clone of it in the environment variable GPT_FAST",
        ("train", "--shape", "stories", "--compare", "hf"): "bench: there is nothing to compare train with",
    }.items():
        code, out, err = cli(monkeypatch, capsys, "bench", *args)
        assert code == 2 and not out and err.startswith(f"llama-fn: {message}")


@pytest.mark.slow
@pytest.mark.parametrize(("what", "batch"), [("decode", 1), ("prefill", 2)])
def test_a_step_is_measured_beside_the_machines_ceiling(monkeypatch, capsys, what, batch):
    monkeypatch.setattr(ceiling, "READ", 2**20)
    code, out, _ = cli(monkeypatch, capsys, "bench", what, "--shape", "stories", "--dtype", "float32", "--rounds", "3",
                       "--batch", str(batch), "--context", "9", "--max-len", "32", "--json-out")
    (title, figures), = ((key, value) for key, value in json.loads(out).items() if key != "machine")
    assert code == 0 and title == f"{what}: stories, float32, {batch} x 9, 32 slots"
    tokens = {"decode": batch, "prefill": 9 * batch}[what]
    speed, ms = (float(re.match(r"[\d.e+]+", figures[f"llama_fn, {unit}"])[0]) for unit in ("tokens a second", "ms"))
    assert speed * ms / 1e3 == pytest.approx(tokens, rel=0.01)  # the medians of x and 1 / x, in four digits
    assert any(name.startswith("share of the ") for name in figures)


@pytest.mark.slow
def test_a_new_process_computes_its_first_token(tmp_path):
    work = Work(shape="stories", dtype="float32", context=9, max_len=32)
    assert 0 < seconds_to_first_token(work, compiled=False, cache=tmp_path) < 300
