"""Weights in eight bits: near the ones they stand for, and computed with as those."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys, models, token_rows
from test_model import close
from torch.func import grad

import llama_fn as lf
from llama_fn.checkpoint.load import load
from llama_fn.model import linear
from llama_fn.model.quantized import Quantized, dequantized, quantized


def matrices(params: lf.Params) -> dict[str, Quantized]:
    return {path.removesuffix(".values") for path in lf.tree.paths(params) if path.endswith(".values")}


@given(keys(), st.sampled_from([((5,), (7,)), ((2, 3), (7,)), ((5,), (2, 3, 4))]), st.floats(-25, 25))
def test_a_number_is_half_a_step_away_at_most(key, axes, size):
    outer, inner = axes
    weight = lf.random.normal(key, (*outer, *inner), torch.float64) * 10**size
    small = quantized(weight, len(outer))
    assert small.shape == weight.shape and small.scale.shape == outer
    assert (small.values.flatten(len(outer)).abs().amax(-1) == 127).all()  # the whole range is used
    steps = (dequantized(small, torch.float64) - weight).abs().flatten(len(outer)) / small.scale[..., None]
    assert steps.max() <= 0.5 + 1e-4  # the scale is in float32


@given(keys(), st.sampled_from([((5,), (7,)), ((2, 3), (7,)), ((5,), (2, 3, 4))]))
def test_the_linear_map_is_that_of_the_weight_it_stands_for(key, axes):
    outer, inner = axes
    one, two = lf.random.split(key)
    small = quantized(lf.random.normal(one, (*outer, *inner)), len(outer))
    x = lf.random.normal(two, (4, *inner), torch.float64)
    flat = dequantized(small, torch.float64).reshape(math.prod(outer), -1)
    expected = linear.written_out(flat, x.flatten(1)).unflatten(-1, outer)
    assert close(linear.linear(small, x, len(inner)), expected, 1e-6)
    row = linear.one_row(x[:1].flatten(1), small.values.flatten(0, len(outer) - 1).flatten(1))
    assert close(row.unflatten(-1, outer) * small.scale, expected[:1], 1e-6)


@given(keys(), st.sampled_from([(), (1,), (3,), (2, 5)]),
       st.sampled_from([((5,), (16,)), ((5,), (7,)), ((5,), (2, 3, 8))]))
def test_torchs_own_kernel_computes_that_too(key, batch, axes):
    outer, inner = axes
    one, two = lf.random.split(key)
    small = quantized(lf.random.normal(one, (*outer, *inner)), len(outer))
    x = lf.random.normal(two, (*batch, *inner)).bfloat16()
    exact = linear.linear(small, x.double(), len(inner))
    ours = linear.linear(small, x, len(inner))
    assert close(ours.double(), exact, 0.01 * float(exact.abs().max()))
    if math.prod(inner) % 16 == 0:  # of other widths the kernel is wrong, or crashes
        assert torch.equal(ours, linear.packed(small, x, len(inner)))


@given(models(), keys())
def test_the_model_is_that_of_the_weights_it_stands_for(params, key):
    small, rows = lf.quantize(params), token_rows(params.config, 3, 5)
    plain = lf.dequantize(small)
    expected, _ = lf.forward(plain, rows)
    assert close(lf.forward(small, rows)[0], expected, 1e-5)
    mapped, _ = torch.vmap(lf.forward, (None, 0), (0, None))(small, rows)
    assert close(mapped, expected, 1e-5)
    names = {path.rsplit(".", 1)[-1] for path in matrices(small)}
    assert names == {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down", "output"}


@given(models(), keys())
def test_an_adapter_on_top_has_the_gradient_of_one_on_the_weights_it_stands_for(params, key):
    small, tokens = lf.quantize(params), token_rows(params.config, 6)
    adapter = lf.lora.init(key, params, 2, dtype=torch.float64)
    adapter = lf.tree.map(lambda x: x + 0.1, adapter)

    def loss(adapter, params):
        return lf.loss(lf.lora.apply(params, adapter), tokens)

    ours, exact = grad(loss)(adapter, small), grad(loss)(adapter, lf.dequantize(small))
    assert all(close(a, b, 1e-5) for a, b in zip(lf.tree.leaves(ours), lf.tree.leaves(exact), strict=True))


def test_a_matrix_of_zeros_stays_one():
    assert not dequantized(quantized(torch.zeros(3, 4), 1)).any()


def test_a_model_is_loaded_as_it_would_be_quantized():
    ours, whole = load("stories", quantize="int8").params, lf.quantize(load("stories").params)
    assert all(torch.equal(a, b) for a, b in zip(lf.tree.leaves(ours), lf.tree.leaves(whole), strict=True))
    kept = sum(x.nbytes for x in lf.tree.leaves(ours)) / sum(x.nbytes for x in lf.tree.leaves(load("stories").params))
    assert kept < 0.5  # of float32, with the embedding


def test_the_shipped_model_loses_little():
    model, small = lf.load("stories"), lf.load("stories", quantize="int8")
    text = " ".join(story.text for story in lf.stories.stories(lf.random.key(5), 6))
    before, after = (lf.perplexity(m, text).bits_per_byte for m in (model, small))
    assert abs(after - before) < 0.02 * before


def test_what_cannot_be_is_refused_by_name(tmp_path):
    model = lf.load("stories")
    small = lf.quantize(model.params)
    with pytest.raises(ValueError, match=r"weights are quantized to 'int8', got 'int3'"):
        lf.load("stories", quantize="int3")
    with pytest.raises(ValueError, match=r"attention.wq is no tensor but Quantized: quantize the parameters from"):
        lf.quantize(small)
    with pytest.raises(ValueError, match=r"blocks.0.attention.wq.values holds integers, and they have no gradient"):
        lf.optim.adamw(1e-3).init(small)
    with pytest.raises(ValueError, match=r"is no plain tensor, as files need them.*lf.dequantize\(params\)"):
        lf.save(model._replace(params=small), tmp_path / "small")
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match=r"output: a weight is infinite or NaN and has no 8-bit form"):
        lf.quantize(model.params._replace(output=model.params.output * math.inf))
    adapter = lf.lora.init(lf.random.key(0), model.params, 2)
    with pytest.raises(ValueError, match=r"attention.wq is no tensor but Quantized: merge into the parameters"):
        lf.lora.merge(small, adapter)


@pytest.mark.slow
def test_a_compiled_decode_of_one_row_equals_the_eager_one():
    params, tokens = lf.quantize(lf.load("stories").params), torch.arange(5, 17)
    full, _ = lf.forward(params, tokens)
    layer, cache, pieces = lf.jit(lf.block, donate="cache"), lf.init_cache(params.config, max_len=12), []
    with torch.no_grad():
        for token in tokens:
            logits, cache = lf.forward(params, token[None], cache, layer=layer)
            pieces.append(logits)
    assert (torch.cat(pieces) - full).abs().max() < 1e-3
