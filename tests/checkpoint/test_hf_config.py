"""`config.json` as transformers reads and writes it, unsupported settings, and weights that do not fit it."""

import json
from pathlib import Path

import pytest
import torch
from folders import edit_json, same
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import configs, scaled_configs
from transformers import LlamaConfig

import llama_fn as lf
from llama_fn.checkpoint.hf_config import read_config, write_config

NEEDED = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 70,
          "vocab_size": 77}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


@pytest.fixture
def folder(model, tmp_path) -> Path:
    lf.save(model, tmp_path / "model", format="hf")
    return tmp_path / "model"


def edit_weights(folder: Path, changes: dict) -> None:
    """Change weights by name: each change is a function of the weight, or `...` to remove it."""
    state = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        old = state.pop(name, None)
        if change is not ...:
            state[name] = change(old).contiguous()
    save_file(state, folder / "model.safetensors")


# --- what is understood


@given(scaled_configs(), st.booleans())
def test_a_config_survives_transformers_whatever_the_spelling(config, tied):
    written = write_config(config, tied, torch.bfloat16)
    again = LlamaConfig(**json.loads(json.dumps(written)))
    assert again.dtype == torch.bfloat16
    spellings = {"ours": written, "transformers 5": json.loads(again.to_json_string())}
    rope = dict(spellings["transformers 5"]["rope_parameters"])
    assert rope.pop("rope_theta") == config.rope_theta
    for key in ("rope_type", "type"):  # of transformers 4, and of 4.30
        old = {x: value for x, value in written.items() if x not in ("rope_theta", "rope_scaling")}
        old |= {"rope_theta": config.rope_theta, "rope_scaling": {key: rope["rope_type"], **rope}}
        if key == "type":
            del old["rope_scaling"]["rope_type"]
        spellings[key] = old
        spellings[f"{key} in rope_parameters"] = {**old, "rope_scaling": None, "rope_parameters": old["rope_scaling"]}
    for name, settings in spellings.items():
        assert read_config(json.loads(json.dumps(settings)), name) == (config, tied), name


@given(st.sets(st.sampled_from(["num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_theta",
                                "rope_scaling", "rope_parameters", "tie_word_embeddings", "head_dim", "hidden_act",
                                "model_type", "attention_bias", "mlp_bias", "torch_dtype"])), configs())
def test_what_a_config_leaves_out_is_what_transformers_takes(names, config):
    settings = {name: x for name, x in write_config(config, True, torch.float16).items() if name not in names}
    full = LlamaConfig(**settings).to_dict()
    ours, tied = read_config(settings, "config.json")
    assert tied == full["tie_word_embeddings"] == ("tie_word_embeddings" not in names)
    assert (ours.n_kv_heads, ours.norm_eps, ours.max_seq_len, ours.head_dim, ours.rope_theta) == (
        full["num_key_value_heads"], full["rms_norm_eps"], full["max_position_embeddings"], full["head_dim"],
        full["rope_parameters"]["rope_theta"])


def test_the_defaults_are_those_of_llama_in_transformers():
    config, tied = read_config(NEEDED, "config.json")
    assert (config.n_kv_heads, config.norm_eps, config.max_seq_len, config.rope_theta, config.rope_scaling, tied) == (
        6, 1e-6, 2048, 10000.0, None, False)


@pytest.mark.parametrize("rope", [
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5,
     "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    {"rope_scaling": None, "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": {}, "rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}, "rope_theta": 1e4},
])
def test_of_two_ropes_the_one_that_transformers_takes_counts(rope):
    expected = LlamaConfig(**NEEDED, **json.loads(json.dumps(rope))).rope_parameters
    config, _ = read_config({**NEEDED, **rope}, "config.json")
    assert config.rope_theta == expected["rope_theta"]
    assert (config.rope_scaling.factor if config.rope_scaling else None) == expected.get("factor")


# --- what is refused


@pytest.mark.parametrize("changes, message", [
    ({"hidden_size": ..., "vocab_size": ...}, "hidden_size, vocab_size missing"),
    ({"model_type": "mixtral"}, "model_type is 'mixtral', only 'llama' or 'mistral' can be loaded"),
    ({"model_type": ["llama"]}, r"model_type is \['llama'\], only"),
    ({"model_type": ..., "architectures": ["GPT2LMHeadModel"]}, "architectures is .*, only LlamaForCausalLM or "),
    ({"model_type": "mistral", "sliding_window": 95}, "sliding_window is 95, less than max_position_embeddings, 96: "),
    ({"model_type": "mistral", "sliding_window": "96"}, "sliding_window is '96'"),
    ({"model_type": "mistral", "max_position_embeddings": ...}, "sliding_window is 4096, less than .*, 131072"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
    ({"attention_bias": True}, "attention_bias is True, only False"),
    ({"mlp_bias": True}, "mlp_bias is True, only False"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, only None"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5, only 1\.0"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
     r"partial_rotary_factor is 0\.5, only 1\.0"),
    ({"head_dim": 16}, "head_dim is 16, only hidden_size / num_attention_heads = 8"),
    ({"hidden_size": 50}, r"dim \(50\) must be a multiple of n_heads \(6\)"),
    ({"hidden_size": "48"}, "dim must be an integer of at least 1, got '48'"),
    ({"num_hidden_layers": None}, "n_layers must be an integer of at least 1, got None"),
    ({"num_key_value_heads": 4}, r"n_heads \(6\) must be a multiple of n_kv_heads \(4\)"),
    ({"num_key_value_heads": 0}, "n_kv_heads must be an integer of at least 1, got 0"),
    ({"rms_norm_eps": "1e-5"}, "norm_eps must be a number above 0, got '1e-5'"),
    ({"rope_theta": -1.0}, r"rope_theta must be a number above 0, got -1\.0"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
    ({"rope_parameters": [2.0]}, r"rope_scaling must be an object, got \[2\.0\]"),
    *(({key: {kind: name, "factor": 2.0}}, f"rope_scaling of the kind '{name}' is not known, only 'linear' and 'llama3")
      for key in ("rope_scaling", "rope_parameters") for kind in ("type", "rope_type")
      for name in ("dynamic", "yarn", "longrope")),
    ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, r"rope_scaling of the kind \['linear'\] is not known"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling of the kind 'linear': factor missing"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'llama3': low_freq_factor, high_freq_factor, original_m"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number above 0, got '2'"),
    ({"rope_scaling": {**LLAMA3, "factor": 0}}, "factor must be a number above 0, got 0"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, r"high_freq_factor \(4\.0\) must be above low_freq_factor"),
    ({"num_hidden_layers": 10**9}, "config.json: it says 1000000000 layers, but there are 39 weights"),
])
def test_what_cannot_be_honored_is_refused_by_name(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        lf.load(folder)
    assert str(folder) in str(error.value)


def test_a_config_of_transformers_is_refused_as_its_file_is(model):
    state, config = lf.to_hf(model.params), model.params.config
    settings = write_config(config, False, torch.float32)
    with pytest.raises(ValueError, match="config: attention_bias is True, only False can be loaded"):
        lf.from_hf(state, LlamaConfig(**{**settings, "attention_bias": True}))
    with pytest.raises(ValueError, match="rope_scaling of the kind 'yarn' is not known"):
        lf.from_hf(state, LlamaConfig(**{**settings, "rope_scaling": {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 48}}))


def test_all_weights_that_do_not_fit_are_named_in_one_error(model, folder):
    layer = "model.layers.0."
    changes = {
        f"{layer}self_attn.q_proj.weight": ..., f"{layer}mlp.gate_proj.weight": lambda x: x.T,
        f"{layer}mlp.down_proj.weight": lambda x: x.to(torch.int8), "model.norm.weight": lambda x: x[:-1],
        f"{layer}self_attn.o_proj.weight": lambda x: x.half(),
        f"{layer}self_attn.q_proj.bias": lambda _: torch.ones(48),
        f"{layer}self_attn.rotary_emb.inv_freq": lambda _: torch.ones(4), "lm_head.weight": ...,
    }
    edit_weights(folder, changes)
    reasons = [
        "missing: lm_head.weight", f"missing: {layer}self_attn.q_proj.weight",
        f"{layer}mlp.down_proj.weight in FILE: should be [48, 70], is I8",
        f"{layer}mlp.gate_proj.weight in FILE: should be [70, 48], is float32[48, 70]",
        f"{layer}self_attn.o_proj.weight in FILE: is float16[48, 48] among float32; load it with a dtype",
        "model.norm.weight in FILE: should be [48], is float32[47]", f"unknown: {layer}self_attn.q_proj.bias in FILE",
    ]
    with pytest.raises(ValueError) as error:
        lf.load(folder)
    first, *lines = str(error.value).split("\n")
    assert first == f"{folder}: 7 weights do not fit the settings:"
    assert sorted(line.strip() for line in lines) == sorted(x.replace("FILE", "model.safetensors") for x in reasons)

    state = load_file(folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        lf.from_hf(state, model.params.config)
    first, *lines = str(error.value).split("\n")
    assert first == "from_hf: 7 weights do not fit the settings:"
    assert sorted(line.strip() for line in lines) == sorted(
        x.replace("FILE", "the state_dict").replace("I8", "int8") for x in reasons)


def test_the_frequencies_in_old_checkpoints_are_left_out(model, folder):
    edit_weights(folder, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": lambda _: torch.ones(4) for i in range(4)})
    assert same(lf.load(folder).params, model.params)
    assert same(lf.from_hf(load_file(folder / "model.safetensors"), model.params.config), model.params)


def test_mixed_dtypes_need_a_dtype(model, folder):
    edit_weights(folder, {"model.norm.weight": torch.Tensor.bfloat16})
    with pytest.raises(ValueError, match=r"model\.norm\.weight in .*: is bfloat16\[48\] among float32; load it with"):
        lf.load(folder)
    expected = model.params._replace(norm=model.params.norm.bfloat16())
    assert same(lf.load(folder, dtype=torch.float64).params, lf.tree.map(torch.Tensor.double, expected))
