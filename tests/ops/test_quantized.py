"""Weights in eight or four bits: near the ones they were made of, and computed with as those they stand for."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numerics import close
from strategies import keys, models, token_rows
from torch.func import grad

import llama_fn as lf
from llama_fn.checkpoint.load import load
from llama_fn.ops.quantized import GROUP, dequantized, grouped, quantized

BITS = st.sampled_from(["int8", "int4"])
AXES = st.sampled_from([((5,), (8,)), ((5,), (64,)), ((2, 3), (70,)), ((5,), (2, 3, 24)), ((2, 3, 4), (200,))])


@st.composite
def small_models(draw, bits: st.SearchStrategy = BITS) -> tuple[lf.Params, lf.Params]:
    """A quantized model, and the one that it stands for."""
    params, bits = draw(models()), draw(bits)
    assume(bits == "int8" or params.config.hidden_dim % 2 == 0)
    small = lf.quantize(params, bits)
    return small, lf.dequantize(small)


def size_of(params: lf.Params) -> int:
    return sum(x.nbytes for x in lf.tree.leaves(params))


@given(keys(), AXES, st.floats(-25, 25))
def test_a_number_in_8_bits_is_half_a_step_away_at_most(key, axes, size):
    outer, inner = axes
    weight = lf.random.normal(key, (*outer, *inner), torch.float64) * 10**size
    small = quantized(weight, len(outer))
    assert small.shape == weight.shape and small.scale.shape == outer
    assert (small.values.flatten(len(outer)).abs().amax(-1) == 127).all()  # the whole range is used
    steps = (dequantized(small, torch.float64) - weight).abs().flatten(len(outer)) / small.scale[..., None]
    assert steps.max() <= 0.5 + 1e-4  # the scale is in float32


@given(keys(), AXES, st.floats(-25, 25), st.sampled_from([0.0, 1.0, -30.0, 1000.0]))
def test_a_number_in_4_bits_is_half_a_step_away_at_most(key, axes, size, mean):
    outer, inner = axes
    weight = (lf.random.normal(key, (*outer, *inner), torch.float64) + mean) * 10**size
    small = grouped(weight, len(outer))
    groups = -(-math.prod(inner) // GROUP)
    assert small.shape == weight.shape and small.scale.shape == (*outer, groups, 2)
    assert small.values.nbytes == weight.numel() / 2 and small.scale.nbytes == math.prod(outer) * groups * 4
    exact, ours = (x.double().flatten(len(outer)).split(GROUP, -1) for x in (weight, dequantized(small, torch.float64)))
    for i, (w, y) in enumerate(zip(exact, ours, strict=True)):  # the last may be a part of a group
        lost = 2**-8 * w.amin(-1).abs()  # by the minimum, in bfloat16
        limit = torch.maximum(small.scale[..., i, 0] / 2, lost) + 1e-6 * w.abs().amax(-1)  # weights go through float32
        assert ((y - w).abs().amax(-1) <= limit).all()
        assert (small.scale[..., i, 0] <= 1.01 * (w.amax(-1) - w.amin(-1) + lost) / 15).all()  # as fine as may be


@given(keys(), AXES)
def test_groups_are_quantized_each_by_itself(key, axes):
    outer, inner = axes
    weight = lf.random.normal(key, (*outer, *inner))
    whole = dequantized(grouped(weight, len(outer))).flatten(len(outer))
    parts = [dequantized(grouped(part, len(outer))) for part in weight.flatten(len(outer)).split(GROUP, -1)]
    assert torch.equal(whole, torch.cat(parts, -1))


def test_integers_from_0_to_15_are_exact_in_4_bits():
    weight = torch.arange(16.0).repeat(3, 8).roll(5, -1)
    small = grouped(weight, 1)
    assert torch.equal(dequantized(small), weight)
    assert small.values[0, :4].tolist() == [11 + 16 * 12, 13 + 16 * 14, 15 + 16 * 0, 1 + 16 * 2]  # the first below


@given(small_models())
def test_the_model_is_that_of_the_weights_it_stands_for(drawn):
    small, plain = drawn
    rows = token_rows(plain.config, 3, 5)
    expected, _ = lf.forward(plain, rows)
    assert close(lf.forward(small, rows)[0], expected)
    mapped, _ = torch.vmap(lf.forward, (None, 0), (0, None))(small, rows)
    assert close(mapped, expected)
    names = {path.split(".")[-2] for path in lf.tree.paths(small) if path.endswith(".values")}
    assert names == {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down", "output"}


@given(small_models(), keys())
def test_an_adapter_on_top_has_the_gradient_of_one_on_the_weights_it_stands_for(drawn, key):
    (small, plain), tokens = drawn, token_rows(drawn[0].config, 6)
    adapter = lf.tree.map(lambda x: x + 0.1, lf.lora.init(key, plain, 2, dtype=torch.float64))

    def loss(adapter, params):
        return lf.loss(lf.lora.apply(params, adapter), tokens)

    ours, exact = grad(loss)(adapter, small), grad(loss)(adapter, plain)
    assert all(close(a, b) for a, b in zip(lf.tree.leaves(ours), lf.tree.leaves(exact), strict=True))


@pytest.mark.parametrize("kind", [quantized, grouped])
def test_a_matrix_of_one_number_stays_one(kind):
    assert not dequantized(kind(torch.zeros(3, 4), 1)).any()
    assert torch.equal(dequantized(kind(torch.full((3, 70), -1.5), 1)), torch.full((3, 70), -1.5))


@pytest.mark.parametrize(("bits", "share"), [("int8", 0.5), ("int4", 0.3)])
def test_a_model_is_loaded_as_it_would_be_quantized(bits, share):
    ours, plain = load("stories", quantize=bits).params, load("stories").params
    whole = lf.quantize(plain, bits)
    assert lf.tree.structure(ours) == lf.tree.structure(whole)
    assert all(torch.equal(a, b) for a, b in zip(lf.tree.leaves(ours), lf.tree.leaves(whole), strict=True))
    assert size_of(ours) < share * size_of(plain)  # of float32, with the embedding


@pytest.mark.parametrize(("bits", "share"), [("int8", 0.01), ("int4", 0.3)])
def test_the_shipped_model_loses_little(bits, share):
    model, small = lf.load("stories"), lf.load("stories", quantize=bits)
    text = " ".join(story.text for story in lf.stories.stories(lf.random.key(5), 6))
    before, after = (lf.perplexity(m, text).bits_per_byte for m in (model, small))
    assert abs(after - before) < share * before


def test_what_cannot_be_is_refused_by_name(tmp_path):
    model = lf.load("stories")
    small = lf.quantize(model.params)
    with pytest.raises(ValueError, match=r"weights are quantized to 'int8' or 'int4', got 'int3'"):
        lf.load("stories", quantize="int3")
    for twice in (small, lf.quantize(model.params, "int4")):
        with pytest.raises(ValueError, match=r"attention.wq is no tensor but \w+: quantize the parameters from"):
            lf.quantize(twice, "int4")
        with pytest.raises(ValueError, match=r"blocks.0.attention.wq.values holds integers, and they have no gradient"):
            lf.optim.adamw(1e-3).init(twice)
        with pytest.raises(RuntimeError, match=r"only Tensors of floating point .*dtype can require gradients"):
            grad(lf.loss)(twice, torch.arange(5))  # torch's own, before any of our code runs
    for bits in ("8-bit", "4-bit"):
        for bad in (math.inf, math.nan):
            with pytest.raises(ValueError, match=rf"output: a weight is infinite or NaN and has no {bits} form"):
                lf.quantize(model.params._replace(output=model.params.output * bad), f"int{bits[0]}")
    one_nan = model.params.output.clone()
    one_nan[5, 7] = math.nan
    with pytest.raises(ValueError, match=r"output: a weight is infinite or NaN and has no 4-bit form"):
        lf.quantize(model.params._replace(output=one_nan), "int4")
    odd = lf.init_params(lf.random.key(0), lf.Config(48, 1, 6, 2, 77, 71))
    with pytest.raises(ValueError, match=r"blocks.0.feed_forward.w_down: 4-bit weights lie in pairs, and the last axis "
                                         r"of \[48, 71\] is odd; use int8"):
        lf.quantize(odd, "int4")
    with pytest.raises(ValueError, match=r"attention.wq is no tensor but Quantized: merge into the parameters"):
        lf.lora.merge(small, lf.lora.init(lf.random.key(0), model.params, 2))
