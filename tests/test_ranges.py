"""What counts as a number: every public function's numbers, in Python's types and NumPy's, inside and outside their
ranges.
"""

import dataclasses
import inspect
import json
import math
import tempfile
import types
import typing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import token_rows

import llama_fn as lf
from llama_fn.model.rope import rotation
from llama_fn.ranges import integer, number
from llama_fn.training import schedule

KEY = lf.random.key(7)
CONFIG = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)
PARAMS = lf.init_params(KEY, CONFIG)
ROWS = token_rows(CONFIG, 3, 7)
LOGITS = lf.random.normal(KEY, (3, 77))
X = lf.random.normal(KEY, (3, 5, 48))


def trained(optimizer: lf.optim.Optimizer) -> object:
    """Two steps of an optimizer."""
    params, state = {"w": X, "b": X[0]}, optimizer.init({"w": X, "b": X[0]})
    for _ in range(2):
        updates, state = optimizer.update(lf.tree.map(torch.sin, params), state, params)
        params = lf.optim.apply_updates(params, updates)
    return params, state


def rates(made: object) -> list[float]:
    return [float(made(torch.tensor(step))) for step in range(9)]


def model(**fields: object) -> object:
    """What a config says, and the logits that it leads to."""
    config = dataclasses.replace(CONFIG, **fields)
    return str(config), hash(config), lf.forward(PARAMS._replace(config=config), ROWS)[0]


def scaling(**fields: object) -> object:
    return model(rope_scaling=lf.RopeScaling(**{"kind": "llama3", "factor": 8.0, "original_max_seq_len": 3} | fields))


def turned(theta: object) -> object:
    return rotation(torch.arange(9), 8, theta)


def layer(eps: object) -> object:
    return lf.block(PARAMS.blocks[0], X, rotation(torch.arange(5).expand(3, 5), 8, 1e4), None, None, None, eps)


# Every float that a public function takes: a whole number in its range, what the number leads to, numbers outside.
FLOATS = {
    "Config.norm_eps": (1, lambda n: model(norm_eps=n), (0, -1, math.nan, math.inf)),
    "Config.rope_theta": (1000000, lambda n: model(rope_theta=n), (0, -1, math.nan, math.inf, 10**400)),
    "RopeScaling.factor": (4, lambda n: scaling(factor=n), (0, -1, math.nan, math.inf)),
    "RopeScaling.low_freq_factor": (2, lambda n: scaling(low_freq_factor=n), (0, -1, math.nan, math.inf)),
    "RopeScaling.high_freq_factor": (3, lambda n: scaling(high_freq_factor=n), (0, -1, math.nan, math.inf)),
    "block.eps": (1, layer, ()),
    "head.eps": (1, lambda n: lf.head(PARAMS.norm, PARAMS.output, X, n), ()),
    "narrowing.temperature": (2, lambda n: lf.narrowing(n)(LOGITS), (-1, math.nan, math.inf, 10**400)),
    "narrowing.top_p": (1, lambda n: lf.narrowing(top_p=n)(LOGITS), (0, -1, 2, math.nan)),
    "narrowing.min_p": (1, lambda n: lf.narrowing(min_p=n)(LOGITS), (-1, 2, math.nan)),
    "narrowing.repetition_penalty": (2, lambda n: lf.narrowing(repetition_penalty=n)(LOGITS, ROWS),
                                     (0, -1, math.nan, math.inf)),
    "sampler.temperature": (2, lambda n: lf.sampler(n)(KEY, LOGITS), (-1, math.nan, math.inf)),
    "sampler.top_p": (1, lambda n: lf.sampler(top_p=n)(KEY, LOGITS), (0, -1, 2, math.nan)),
    "sampler.min_p": (1, lambda n: lf.sampler(min_p=n)(KEY, LOGITS), (-1, 2, math.nan)),
    "sampler.repetition_penalty": (2, lambda n: lf.sampler(repetition_penalty=n)(KEY, LOGITS, ROWS),
                                   (0, -1, math.nan, math.inf)),
    "uniform.minval": (-3, lambda n: lf.random.uniform(KEY, (5,), minval=n), (math.nan, math.inf, 10**400)),
    "uniform.maxval": (3, lambda n: lf.random.uniform(KEY, (5,), maxval=n), (math.nan, -math.inf, 10**400)),
    "init.alpha": (3, lambda n: lf.lora.init(KEY, PARAMS, 2, alpha=n), (0, -1, math.nan, math.inf, 10**400)),
    "dpo_loss.beta": (1, lambda n: lf.dpo_loss(PARAMS, lf.tree.map(torch.sin, PARAMS), (ROWS, ROWS > 9),
                                               (ROWS.flip(0), ROWS > 9), beta=n), (-1, math.nan, math.inf)),
    "clipped_sum.max_norm": (1, lambda n: lf.clipped_sum(lf.loss, PARAMS, ROWS, n), (0, -1, math.nan)),
    "private_grads.max_norm": (1, lambda n: lf.private_grads(lf.loss, PARAMS, ROWS, max_norm=n, noise_multiplier=1,
                                                             key=KEY), (0, -1, math.nan, math.inf)),
    "private_grads.noise_multiplier": (1, lambda n: lf.private_grads(
        lf.loss, PARAMS, ROWS, max_norm=1, noise_multiplier=n, key=KEY), (-1, math.nan, math.inf)),
    "private_grads.expected_batch_size": (5, lambda n: lf.private_grads(
        lf.loss, PARAMS, ROWS, max_norm=1, noise_multiplier=0, key=KEY, expected_batch_size=n), (0, -1, math.nan)),
    "loss.z_loss": (1, lambda n: lf.loss(PARAMS, ROWS, z_loss=n), (-1, math.nan, math.inf)),
    "loss.label_smoothing": (1, lambda n: lf.loss(PARAMS, ROWS, label_smoothing=n), (-1, 2, math.nan)),
    "loss_sum.z_loss": (1, lambda n: lf.loss_sum(PARAMS, ROWS, z_loss=n), (-1, math.nan, math.inf)),
    "loss_sum.label_smoothing": (1, lambda n: lf.loss_sum(PARAMS, ROWS, label_smoothing=n), (-1, 2, math.nan)),
    "adamw.learning_rate": (1, lambda n: trained(lf.optim.adamw(n)), (-1, math.nan, math.inf)),
    "adamw.b1": (0, lambda n: trained(lf.optim.adamw(0.1, n)), (-1, 1, math.nan)),
    "adamw.b2": (0, lambda n: trained(lf.optim.adamw(0.1, 0.9, n)), (-1, 1, math.nan)),
    "adamw.eps": (1, lambda n: trained(lf.optim.adamw(0.1, eps=n)), (-1, math.nan, math.inf)),
    "adamw.weight_decay": (1, lambda n: trained(lf.optim.adamw(0.1, weight_decay=n)), (-1, math.nan, math.inf)),
    "lion.learning_rate": (1, lambda n: trained(lf.optim.lion(n)), (-1, math.nan, math.inf)),
    "lion.b1": (0, lambda n: trained(lf.optim.lion(0.1, n)), (-1, 1, math.nan)),
    "lion.b2": (0, lambda n: trained(lf.optim.lion(0.1, 0.9, n)), (-1, 1, math.nan)),
    "lion.weight_decay": (1, lambda n: trained(lf.optim.lion(0.1, weight_decay=n)), (-1, math.nan, math.inf)),
    "scale_by_lion.b1": (0, lambda n: trained(lf.optim.scale_by_lion(n, 0.9)), (-1, 1, math.nan)),
    "scale_by_lion.b2": (0, lambda n: trained(lf.optim.scale_by_lion(0.9, n)), (-1, 1, math.nan)),
    "muon.learning_rate": (1, lambda n: trained(lf.optim.muon(n)), (-1, math.nan, math.inf)),
    "muon.momentum": (0, lambda n: trained(lf.optim.muon(0.1, n)), (-1, 1, math.nan)),
    "muon.b1": (0, lambda n: trained(lf.optim.muon(0.1, b1=n)), (-1, 1, math.nan)),
    "muon.b2": (0, lambda n: trained(lf.optim.muon(0.1, b2=n)), (-1, 1, math.nan)),
    "muon.eps": (1, lambda n: trained(lf.optim.muon(0.1, eps=n)), (-1, math.nan, math.inf)),
    "muon.weight_decay": (1, lambda n: trained(lf.optim.muon(0.1, weight_decay=n)), (-1, math.nan, math.inf)),
    "scale_by_muon.momentum": (0, lambda n: trained(lf.optim.scale_by_muon(n, 0.9, 0.9, 1e-8)), (-1, 1, math.nan)),
    "scale_by_muon.b1": (0, lambda n: trained(lf.optim.scale_by_muon(0.9, n, 0.9, 1e-8)), (-1, 1, math.nan)),
    "scale_by_muon.b2": (0, lambda n: trained(lf.optim.scale_by_muon(0.9, 0.9, n, 1e-8)), (-1, 1, math.nan)),
    "scale_by_muon.eps": (1, lambda n: trained(lf.optim.scale_by_muon(0.9, 0.9, 0.9, n)), (-1, math.nan, math.inf)),
    "sgd.learning_rate": (1, lambda n: trained(lf.optim.sgd(n)), (-1, math.nan, math.inf)),
    "clip_by_global_norm.max_norm": (1, lambda n: trained(lf.optim.clip_by_global_norm(n)), (0, -1, math.nan)),
    "scale_by_adam.b1": (0, lambda n: trained(lf.optim.scale_by_adam(n, 0.9, 1e-8)), (-1, 1, math.nan)),
    "scale_by_adam.b2": (0, lambda n: trained(lf.optim.scale_by_adam(0.9, n, 1e-8)), (-1, 1, math.nan)),
    "scale_by_adam.eps": (1, lambda n: trained(lf.optim.scale_by_adam(0.9, 0.9, n)), (-1, math.nan, math.inf)),
    "add_decayed_weights.weight_decay": (1, lambda n: trained(lf.optim.add_decayed_weights(n)),
                                         (-1, math.nan, math.inf)),
    "scale_by_learning_rate.learning_rate": (1, lambda n: trained(lf.optim.scale_by_learning_rate(n)),
                                             (-1, math.nan, math.inf)),
    "warmup_cosine.peak": (1, lambda n: rates(schedule.warmup_cosine(n, 3, 8)), (-1, math.nan, math.inf)),
    "warmup_cosine.end": (1, lambda n: rates(schedule.warmup_cosine(3.0, 3, 8, n)), (-1, math.nan, math.inf)),
    "warmup_stable_decay.peak": (1, lambda n: rates(schedule.warmup_stable_decay(n, 3, 2, 8)),
                                 (-1, math.nan, math.inf)),
    "warmup_stable_decay.end": (1, lambda n: rates(schedule.warmup_stable_decay(3.0, 3, 2, 8, n)),
                                (-1, math.nan, math.inf)),
    "warmup_linear.peak": (1, lambda n: rates(schedule.warmup_linear(n, 3, 8)), (-1, math.nan, math.inf)),
    "warmup_linear.end": (1, lambda n: rates(schedule.warmup_linear(3.0, 3, 8, n)), (-1, math.nan, math.inf)),
    "bernoulli.p": (1, lambda n: lf.random.bernoulli(KEY, n, (5,)), ()),
}


def said(n: object, model: lf.Model) -> object:
    return lf.text_completion(model, ["Once", "One day"], key=KEY, max_new_tokens=n)


# The same of every integer. A function of a number and of a model with a tokenizer.
INTEGERS = {
    "Config.dim": (48, lambda n, m: dataclasses.replace(CONFIG, dim=n), (0, -48)),
    "Config.n_layers": (2, lambda n, m: dataclasses.replace(CONFIG, n_layers=n), (0, -1)),
    "Config.n_heads": (4, lambda n, m: dataclasses.replace(CONFIG, n_heads=n), (0, -1)),
    "Config.n_kv_heads": (3, lambda n, m: dataclasses.replace(CONFIG, n_kv_heads=n), (0, -1)),
    "Config.vocab_size": (3, lambda n, m: dataclasses.replace(CONFIG, vocab_size=n), (0, -1)),
    "Config.hidden_dim": (3, lambda n, m: dataclasses.replace(CONFIG, hidden_dim=n), (0, -1)),
    "Config.max_seq_len": (3, lambda n, m: dataclasses.replace(CONFIG, max_seq_len=n), (0, -1)),
    "RopeScaling.original_max_seq_len": (9, lambda n, m: scaling(original_max_seq_len=n), (0, -1)),
    "init_cache.max_len": (5, lambda n, m: lf.init_cache(CONFIG, max_len=n), (0, -1)),
    "init_cache.batch": (5, lambda n, m: lf.init_cache(CONFIG, (2, n), max_len=3), (-1,)),
    "init_cache.heads": (1, lambda n, m: lf.init_cache(CONFIG, max_len=3, heads=n), (0, -1)),
    "fork.max_len": (9, lambda n, m: lf.fork(lf.init_cache(CONFIG, max_len=5), (2,), max_len=n), (0, -1)),
    "fork.at": (0, lambda n, m: lf.fork(lf.init_cache(CONFIG, max_len=5), (2,), max_len=7, at=n), (-1,)),
    "fork.batch": (3, lambda n, m: lf.fork(lf.init_cache(CONFIG, max_len=5), (n,), max_len=7), (0, -1)),
    "key.seed": (3, lambda n, m: lf.random.key(n), (-1, 2**64)),
    "split.num": (3, lambda n, m: lf.random.split(KEY, n), ()),
    "fold_in.data": (3, lambda n, m: lf.random.fold_in(KEY, n), (-1, 2**32)),
    "bits.width": (16, lambda n, m: lf.random.bits(KEY, (5,), n), (0, 12, -8)),
    "categorical.axis": (0, lambda n, m: lf.random.categorical(KEY, LOGITS, n), ()),
    "narrowing.top_k": (3, lambda n, m: lf.narrowing(top_k=n)(LOGITS), (0, -1)),
    "sampler.top_k": (3, lambda n, m: lf.sampler(top_k=n)(KEY, LOGITS), (0, -1)),
    "init.rank": (3, lambda n, m: lf.lora.init(KEY, PARAMS, n), (0, -1)),
    "clipped_sum.chunk_size": (2, lambda n, m: lf.clipped_sum(lf.loss, PARAMS, ROWS, 1.0, chunk_size=n), (0, -1)),
    "per_sample_grads.chunk_size": (2, lambda n, m: lf.per_sample_grads(lf.loss, PARAMS, ROWS, chunk_size=n), (0, -1)),
    "per_sample_norms.chunk_size": (2, lambda n, m: lf.per_sample_norms(lf.loss, PARAMS, ROWS, chunk_size=n), (0, -1)),
    "private_grads.chunk_size": (2, lambda n, m: lf.private_grads(
        lf.loss, PARAMS, ROWS, max_norm=1.0, noise_multiplier=1.0, key=KEY, chunk_size=n), (0, -1)),
    "warmup_cosine.warmup": (3, lambda n, m: rates(schedule.warmup_cosine(1.0, n, 8)), (-1, 8)),
    "warmup_cosine.steps": (8, lambda n, m: rates(schedule.warmup_cosine(1.0, 3, n)), (3, 0, -1)),
    "warmup_stable_decay.warmup": (3, lambda n, m: rates(schedule.warmup_stable_decay(1.0, n, 2, 8)), (-1, 8, 7)),
    "warmup_stable_decay.decay": (2, lambda n, m: rates(schedule.warmup_stable_decay(1.0, 3, n, 8)), (-1, 0, 6)),
    "warmup_stable_decay.steps": (8, lambda n, m: rates(schedule.warmup_stable_decay(1.0, 3, 2, n)), (3, 0, 4)),
    "warmup_linear.warmup": (3, lambda n, m: rates(schedule.warmup_linear(1.0, n, 8)), (-1, 8)),
    "warmup_linear.steps": (8, lambda n, m: rates(schedule.warmup_linear(1.0, 3, n)), (3, 0, -1)),
    "randint.minval": (3, lambda n, m: lf.random.randint(KEY, (5,), n, 9), ()),
    "randint.maxval": (9, lambda n, m: lf.random.randint(KEY, (5,), 3, n), ()),
    "permutation.x": (9, lambda n, m: lf.random.permutation(KEY, n), (-1,)),
    "permutation.axis": (1, lambda n, m: lf.random.permutation(KEY, LOGITS, n), (2, -3)),
    "generate.max_new_tokens": (3, lambda n, m: lf.generate(PARAMS, [[1, 2]], key=KEY, max_new_tokens=n), (-1,)),
    "stories.count": (2, lambda n, m: list(lf.stories.stories(KEY, n)), (-1,)),
    "train_tokenizer.vocab_size": (270, lambda n, m: lf.train_tokenizer(["abc abd abe"] * 9, n), (0, -1)),
    "save.shards": (2, lambda n, m: saved(n, m), (0, -1)),
    "text_completion.max_new_tokens": (3, said, (-1,)),
    "stream.max_new_tokens": (3, lambda n, m: list(lf.stream(m, "Once", key=KEY, max_new_tokens=n)), (-1,)),
    "chat_completion.max_new_tokens": (3, lambda n, m: lf.chat_completion(
        m, [[{"role": "user", "content": "Hi"}]], key=KEY, max_new_tokens=n), (-1,)),
    "answer.max_new_tokens": (3, lambda n, m: [piece for piece, _ in lf.answer(
        m, lf.ask(m, lf.Chat(), "Hi"), key=KEY, max_new_tokens=n)], (-1,)),
    "speculate.max_new_tokens": (3, lambda n, m: lf.speculate(m, m, ["Once"], key=KEY, max_new_tokens=n), (-1,)),
    "speculate.n": (3, lambda n, m: lf.speculate(m, m, ["Once"], key=KEY, n=n, max_new_tokens=3), (0, -1)),
    "speculate_stream.max_new_tokens": (3, lambda n, m: list(lf.speculate_stream(
        m, m, "Once", key=KEY, max_new_tokens=n)), (-1,)),
    "speculate_stream.n": (3, lambda n, m: list(lf.speculate_stream(m, m, "Once", key=KEY, n=n, max_new_tokens=3)),
                           (0, -1)),
    "score.batch_size": (2, lambda n, m: lf.score(m, ["Once", "One day"], n), (0, -1)),
    "perplexity.window": (9, lambda n, m: lf.perplexity(m, "Once upon a time there was", n), (0, -1)),
    "perplexity.stride": (3, lambda n, m: lf.perplexity(m, "Once upon a time there was", 9, n), (0, -1)),
}


def saved(shards: object, model: lf.Model) -> object:
    with tempfile.TemporaryDirectory() as folder:
        lf.save(model, Path(folder) / "model", format="hf", shards=shards)
        return sorted(file.name for file in (Path(folder) / "model").iterdir())


def same(one: object, other: object) -> bool:
    """Whether two trees are equal, bit for bit."""
    ones, others = lf.tree.leaves(one), lf.tree.leaves(other)
    return lf.tree.structure(one) == lf.tree.structure(other) and all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(ones, others, strict=True))


def kinds_of(kind: type) -> set[str]:
    """The parameters of public functions that take an int, or a float."""
    found = set()
    for module in (lf, lf.random, lf.optim, lf.lora, lf.stories, schedule):
        for name in getattr(module, "__all__", None) or vars(module):
            f = getattr(module, name)
            if name[0] == "_" or not inspect.isfunction(inspect.unwrap(f)):
                continue
            for argument, hint in typing.get_type_hints(f).items():
                union = typing.get_origin(hint) in (typing.Union, types.UnionType)
                if argument != "return" and kind in (typing.get_args(hint) if union else (hint,)):
                    found.add(f"{name}.{argument}")
    return found


def test_the_tables_hold_every_public_number():
    inner = {"added.times", "write_peft.alpha", "number.low", "number.high", "integer.least"}  # imported, not public
    assert kinds_of(float) - inner <= FLOATS.keys() and kinds_of(int) - inner <= INTEGERS.keys()
    for cls in (lf.Config, lf.RopeScaling):
        for name, hint in typing.get_type_hints(cls).items():
            assert hint not in (int, float) or f"{cls.__name__}.{name}" in (FLOATS if hint is float else INTEGERS)


@pytest.mark.parametrize("name", FLOATS)
def test_a_whole_number_is_the_float_that_it_equals(name):
    n, f, _ = FLOATS[name]
    expected = f(float(n))
    for kind in (int, np.float64, np.float32, np.int64):
        assert same(f(kind(n)), expected), kind


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_no_number_is_refused_where_a_float_is_meant(name):
    n, f, outside = FLOATS[name]
    for wrong in (bool(n), np.bool_(n), str(n), complex(n), Fraction(n), [n], *outside):
        with pytest.raises(ValueError, match=name.split(".")[1]):
            f(wrong)


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_of_numpys_is_that_of_python(name, model):
    n, f, _ = INTEGERS[name]
    expected = f(n, model)
    for kind in (np.int64, np.int32, np.uint16):
        assert same(f(kind(n), model), expected), kind


@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer_is_refused_where_one_is_meant(name, model):
    n, f, outside = INTEGERS[name]
    fractions = () if name == "RopeScaling.original_max_seq_len" else (float(n), n + 0.5, math.nan)
    for wrong in (bool(n), np.bool_(n), str(n), *fractions, *outside):
        with pytest.raises(ValueError):
            f(wrong, model)


@given(st.floats(allow_nan=True) | st.integers() | st.sampled_from(["low", "high"]), st.floats(-9, 9), st.floats(0, 9),
       st.booleans(), st.booleans())
@example("low", 0.0, 1.0, True, False)
@example("high", 0.0, 1.0, False, True)
def test_a_number_is_what_lies_in_its_interval(value, low, width, above, below):
    high = low + width
    value = {"low": low, "high": high}.get(value, value)
    inside = (low < value if above else low <= value) and (value < high if below else value <= high)
    if inside:
        assert number("n", value, low, high, above=above, below=below) == value
    else:
        with pytest.raises(ValueError, match="n must lie in"):
            number("n", value, low, high, above=above, below=below)


@given(st.integers(-(2**62), 2**62), st.integers(-9, 9))
def test_an_integer_is_at_least_the_least(value, least):
    for n in (value, np.int64(value)):
        if value >= least:
            assert type(integer("n", n, least)) is int and integer("n", n, least) == value
        else:
            with pytest.raises(ValueError, match=f"n must be at least {least}, got {value}"):
                integer("n", n, least)


def test_two_configs_that_are_equal_are_one():
    whole, float_ = (dataclasses.replace(CONFIG, rope_theta=x, norm_eps=1, rope_scaling=lf.RopeScaling("linear", y))
                     for x, y in ((1000000, 2), (1000000.0, 2.0)))
    assert whole == float_ and hash(whole) == hash(float_) and str(whole) == str(float_)
    assert lf.tree.structure(whole) == lf.tree.structure(float_)


# --- numbers that are in their range, but not in that of float32


@pytest.mark.parametrize("settings", [{"top_p": 1e-300}, {"temperature": 1e-300}, {"temperature": 5e-324},
                                      {"top_p": 5e-324, "temperature": 1e-300}, {"min_p": 1.0}, {"top_k": 1}])
def test_of_ever_narrower_settings_the_likeliest_token_stays(settings):
    greedy = lf.narrowing(0)(LOGITS).softmax(-1)
    assert torch.equal(lf.narrowing(**settings)(LOGITS).softmax(-1), greedy)
    assert torch.equal(lf.sampler(**settings)(KEY, LOGITS), LOGITS.argmax(-1))


@pytest.mark.parametrize("penalty", [1e-300, 1e-45, 1e45, 1e300])
def test_a_penalty_without_measure_still_leaves_numbers(penalty):
    logits = LOGITS.clone()
    logits[:, :3] = 0  # times infinity it would be NaN
    for temperature in (1.0, 1e-3):
        narrowed = lf.narrowing(temperature, repetition_penalty=penalty)(logits, ROWS)
        assert not narrowed.isnan().any() and not narrowed.softmax(-1).isnan().any()


# --- whole numbers in files


@pytest.mark.parametrize("format, file, fields", [
    ("hf", "config.json", {"rope_theta": 1000000, "rms_norm_eps": 1}),
    ("hf", "config.json", {"rope_scaling": {"rope_type": "linear", "factor": 4}}),
    ("hf", "config.json", {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                                            "high_freq_factor": 4, "original_max_position_embeddings": 3}}),
    ("hf", "config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "rope_scaling": None}),
    ("meta", "params.json", {"rope_theta": 1000000, "norm_eps": 1, "use_scaled_rope": True}),
])
def test_a_whole_number_in_a_file_gives_the_floats_logits(tmp_path, model, format, file, fields):
    def floats(x: object) -> object:
        return {name: floats(y) for name, y in x.items()} if isinstance(x, dict) else float(x) if type(x) is int else x

    lf.save(model, tmp_path / "model", format=format)
    settings, tokens = json.loads((tmp_path / "model" / file).read_text()), token_rows(model.params.config, 9)
    found = []
    for written in (fields, floats(fields)):
        (tmp_path / "model" / file).write_text(json.dumps(settings | written))
        params, _ = lf.load(tmp_path / "model")
        found.append((params.config, lf.forward(params, tokens)[0]))
    assert found[0][0] == found[1][0] != model.params.config and str(found[0][0]) == str(found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], lf.forward(model.params, tokens)[0])
