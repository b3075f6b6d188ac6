import dataclasses
import math
import re

import pytest
from hypothesis import given
from strategies import configs, keys

import llama_fn as lf
from llama_fn import tree
from llama_fn.config import RopeScaling

GOOD = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=50, hidden_dim=70)
INTEGERS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "max_seq_len")
NUMBERS = ("norm_eps", "rope_theta")


@given(keys(), configs())
def test_the_parameter_count_is_that_of_the_leaves(key, config):
    assert config.n_params == sum(x.numel() for x in tree.leaves(lf.init_params(key, config)))
    assert config.n_params == sum(math.prod(weight.shape) for weight in tree.leaves(lf.abstract_params(config)))


@pytest.mark.parametrize("config, count", [(lf.LLAMA2_7B, 6_738_415_616), (lf.LLAMA2_13B, 13_015_864_320),
                                           (lf.LLAMA2_70B, 68_976_648_192)])
def test_the_parameter_count_is_that_of_the_released_weights(config, count):
    assert config.n_params == count


@given(configs())
def test_heads_divide_the_width(config):
    assert config.n_kv_heads * config.group_size == config.n_heads
    assert config.n_heads * config.head_dim == config.dim


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None, math.nan])
def test_a_size_that_is_no_positive_integer_is_an_error(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be an integer of at least 1, got {re.escape(repr(value))}"):
        dataclasses.replace(GOOD, **{field: value})


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [0, -1e-5, math.inf, -math.inf, math.nan, "1e-5", True, None])
def test_a_constant_that_is_no_positive_number_is_an_error(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be a number above 0, got {re.escape(repr(value))}"):
        dataclasses.replace(GOOD, **{field: value})


@pytest.mark.parametrize("fields, message", [
    ({"n_kv_heads": 4}, r"n_heads \(6\) must be a multiple of n_kv_heads \(4\)"),
    ({"n_kv_heads": 12}, r"n_heads \(6\) must be a multiple of n_kv_heads \(12\)"),
    ({"dim": 50}, r"dim \(50\) must be a multiple of n_heads \(6\)"),
    ({"dim": 18}, r"dim / n_heads = 3, must be even"),
])
def test_sizes_that_do_not_fit_each_other_are_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, **fields)


@pytest.mark.parametrize("scaling, message", [
    (RopeScaling("dynamic", 2.0), r"rope_scaling of the kind 'dynamic' is not known, only 'linear' and 'llama3' are"),
    (RopeScaling("linear", 0), "rope_scaling: factor must be a number above 0, got 0"),
    (RopeScaling("linear", True), "rope_scaling: factor must be a number above 0, got True"),
    (RopeScaling("linear", "2"), "rope_scaling: factor must be a number above 0, got '2'"),
    (RopeScaling("llama3", math.nan), "rope_scaling: factor must be a number above 0, got nan"),
    (RopeScaling("llama3", 8.0, -1.0), r"rope_scaling: low_freq_factor must be a number above 0, got -1\.0"),
    (RopeScaling("llama3", 8.0, 1.0, math.inf), "rope_scaling: high_freq_factor must be a number above 0, got inf"),
    (RopeScaling("llama3", 8.0, 1.0, 4.0, None), "original_max_seq_len must be a number above 0, got None"),
    (RopeScaling("llama3", 8.0, 4.0, 4.0), r"high_freq_factor \(4\.0\) must be above low_freq_factor \(4\.0\)"),
])
def test_a_scaling_that_scales_nothing_is_an_error(scaling, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, rope_scaling=scaling)


@given(configs())
def test_a_config_is_a_constant_in_a_tree(config):
    assert tree.leaves(config) == []
    assert tree.map(None, config) == config
    assert tree.structure(config) == tree.structure(dataclasses.replace(config))
    assert tree.structure(config) != tree.structure(dataclasses.replace(config, norm_eps=2e-5))
    assert tree.structure(config) != tree.structure(dataclasses.replace(config, rope_scaling=RopeScaling("linear", 2)))


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.dim = 96
