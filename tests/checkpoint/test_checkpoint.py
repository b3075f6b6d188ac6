import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
from folders import bits, edit_json, edit_weights, read_meta, same, write_meta
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, keys

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint.meta_config import read_config, write_config
from llama_fn.checkpoint.snapshot_pt import load_snapshot_pt
from llama_fn.config import RopeScaling

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The released params.json files. Those of 13B and 70B give the vocabulary; missing settings have their defaults.
RELEASED = [
    (lf.LLAMA2_7B, {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05,
                    "vocab_size": -1}),
    (lf.LLAMA2_13B, {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05,
                     "vocab_size": -1}),
    (lf.LLAMA2_70B, {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                     "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}),
]


@pytest.fixture
def folder(model, tmp_path) -> Path:
    lf.save(model, tmp_path / "model")
    return tmp_path / "model"


@given(keys(), configs(), st.sampled_from(DTYPES))
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path_factory, key, config, dtype):
    params, folder = lf.init_params(key, config, dtype), tmp_path_factory.mktemp("meta")
    write_meta(params, folder)
    assert same(read_meta(folder), params)
    assert same(read_meta(folder, torch.float64), tree.map(torch.Tensor.double, params))


def test_a_model_is_loaded_with_its_tokenizer(model, folder):
    again = lf.load(folder)
    assert same(again.params, model.params) and again.tokenizer == model.tokenizer
    assert sorted(os.listdir(folder)) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")  # where Meta's download has it
    assert lf.load(str(folder)).tokenizer == model.tokenizer


@given(keys(), configs())
def test_metas_weights_are_ours_without_the_axes_of_heads(tmp_path_factory, key, config):
    params, folder = lf.init_params(key, config), tmp_path_factory.mktemp("meta")
    write_meta(params, folder)
    state = torch.load(folder / "consolidated.00.pth")
    d, kv = config.dim, config.n_kv_heads * config.head_dim
    layer = params.blocks[-1]
    expected = {"attention.wq": layer.attention.wq.reshape(d, d), "attention.wk": layer.attention.wk.reshape(kv, d),
                "attention.wv": layer.attention.wv.reshape(kv, d), "attention.wo": layer.attention.wo.reshape(d, d),
                "feed_forward.w1": layer.feed_forward.w_gate, "feed_forward.w2": layer.feed_forward.w_down,
                "feed_forward.w3": layer.feed_forward.w_up, "attention_norm": layer.attention_norm,
                "ffn_norm": layer.ffn_norm}
    assert len(state) == 3 + config.n_layers * len(expected)
    for name, x in expected.items():
        assert bits(state[f"layers.{config.n_layers - 1}.{name}.weight"]) == bits(x)
    for name, x in {"tok_embeddings": params.embedding, "norm": params.norm, "output": params.output}.items():
        assert bits(state[f"{name}.weight"]) == bits(x)


def test_weights_come_back_as_plain_tensors(folder, model):
    edit_weights(folder / "consolidated.00.pth", wq=torch.nn.Parameter)
    for x in tree.leaves(lf.load(folder).params):
        assert type(x) is torch.Tensor and not x.requires_grad


@given(configs(), st.integers(1, 2) | st.integers(1, 5000))
def test_every_hidden_width_survives_its_settings(config, hidden_dim):
    """Meta's file gives it indirectly: 2/3 of 4 d, times one setting, rounded up to a multiple of another."""
    config = dataclasses.replace(config, hidden_dim=hidden_dim)
    assert read_config(json.loads(json.dumps(write_config(config))), {}, "") == config


@pytest.mark.parametrize("config, settings", RELEASED, ids=["7B", "13B", "70B"])
def test_the_released_settings_give_the_released_sizes(config, settings):
    assert read_config(settings, {}, "params.json") == config


def test_what_the_settings_leave_out_is_a_default_or_in_the_weights(folder, model):
    config = dataclasses.replace(model.params.config, max_seq_len=4096)
    edit_json(folder / "params.json", vocab_size=-1, max_seq_len=..., norm_eps=..., rope_theta=...)
    assert lf.load(folder).params.config == config
    edit_json(folder / "params.json", vocab_size=...)
    assert lf.load(folder).params.config == config
    settings = {"dim": 48, "n_layers": 1, "n_heads": 6}
    assert read_config(settings, {}, "").n_kv_heads == 6
    assert read_config(settings | {"n_kv_heads": None}, {}, "").n_kv_heads == 6


def test_settings_that_are_not_known_are_a_warning(folder, model):
    edit_json(folder / "params.json", window=512, max_batch_size=4, moe=None)
    with pytest.warns(UserWarning, match=r"params\.json: unknown settings, left out of account: moe, window$"):
        assert lf.load(folder).params.config == model.params.config


def test_metas_settings_have_one_word_for_scaled_rope(model, tmp_path):
    scaled, slowed = [model.params._replace(config=dataclasses.replace(model.params.config, rope_scaling=scaling))
                      for scaling in (RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), RopeScaling("linear", 8.0))]
    lf.save(model._replace(params=scaled), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "params.json").read_text())["use_scaled_rope"] is True
    assert lf.load(tmp_path / "model").params.config == scaled.config
    with pytest.raises(ValueError, match=r"params\.json cannot express RopeScaling\(kind='linear'.*the format hf"):
        lf.save(model._replace(params=slowed), tmp_path / "new")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("changes, message", [
    ({"dim": ..., "n_heads": ...}, "dim, n_heads missing"),
    ({"dim": None}, "dim must be an integer of at least 1, got None"),
    ({"dim": "48"}, "dim must be an integer of at least 1, got '48'"),
    ({"dim": 49}, r"dim \(49\) must be a multiple of n_heads \(6\)"),
    ({"n_layers": 4.0}, r"n_layers must be an integer of at least 1, got 4\.0"),
    ({"n_heads": 0}, "n_heads must be an integer of at least 1, got 0"),
    ({"n_kv_heads": 0}, "n_kv_heads must be an integer of at least 1, got 0"),
    ({"n_kv_heads": 4}, r"n_heads \(6\) must be a multiple of n_kv_heads \(4\)"),
    ({"vocab_size": -2}, "vocab_size must be an integer of at least 1, got -2"),
    ({"multiple_of": 0}, "multiple_of must be an integer of at least 1, got 0"),
    ({"multiple_of": -70}, "multiple_of must be an integer of at least 1, got -70"),
    ({"multiple_of": "70"}, "multiple_of must be an integer of at least 1, got '70'"),
    ({"ffn_dim_multiplier": "1.3"}, r"ffn_dim_multiplier must be a number above 0, got '1\.3'"),
    ({"ffn_dim_multiplier": float("inf")}, "ffn_dim_multiplier must be a number above 0, got inf"),
    ({"ffn_dim_multiplier": float("nan")}, "ffn_dim_multiplier must be a number above 0, got nan"),
    ({"norm_eps": "1e-5"}, "norm_eps must be a number above 0, got '1e-5'"),
    ({"rope_theta": -1}, "rope_theta must be a number above 0, got -1"),
])
def test_settings_that_make_no_model_are_an_error(folder, changes, message):
    edit_json(folder / "params.json", **changes)
    with pytest.raises(ValueError, match=rf"params\.json: .*{message}"):
        lf.load(folder)


@pytest.mark.parametrize("content, message", [
    (b"{", "not JSON"), (b"", "not JSON"), (b"\xff{}", "not JSON"), (b"[]", "expected a JSON object, found a list"),
])
def test_settings_that_are_no_json_object_are_an_error(folder, content, message):
    (folder / "params.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"params\.json: {message}"):
        lf.load(folder)


def test_all_weights_that_do_not_fit_are_named_in_one_error(folder):
    file = folder / "consolidated.00.pth"
    edit_weights(file, wq=None, w1=lambda x: x.T, norm=lambda x: x[:-1], w3=lambda x: x.int(), wo=lambda x: 5)
    torch.save(torch.load(file) | {"lm_head.weight": torch.ones(1), "rope.freqs": torch.ones(1)}, file)
    with pytest.raises(ValueError) as error:
        lf.load(folder)
    first, *lines = str(error.value).split("\n")
    assert first == f"{folder}: 6 weights do not fit the settings:"
    assert sorted(line.strip() for line in lines) == [
        "layers.0.attention.wo.weight in consolidated.00.pth: should be [48, 48], is int",
        "layers.0.feed_forward.w1.weight in consolidated.00.pth: should be [70, 48], is float32[48, 70]",
        "layers.0.feed_forward.w3.weight in consolidated.00.pth: should be [70, 48], is int32",
        "missing: layers.0.attention.wq.weight in consolidated.00.pth",
        "norm.weight in consolidated.00.pth: should be [48], is float32[47]",
        "unknown: lm_head.weight in consolidated.00.pth",
    ]


@pytest.mark.parametrize("embedding", [torch.tensor(1.0), 5, torch.ones(401)], ids=["scalar", "number", "vector"])
def test_an_embedding_that_is_no_matrix_is_named(folder, embedding):
    edit_json(folder / "params.json", vocab_size=-1)
    edit_weights(folder / "consolidated.00.pth", tok_embeddings=lambda x: embedding)
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight in consolidated\.00\.pth: should be"):
        lf.load(folder)


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: data[:-1], lambda data: b"",
                                    lambda data: b"no weights", lambda data: data[len(data) // 2:]])
def test_a_damaged_file_of_weights_is_an_error_that_names_it(folder, damage):
    file = folder / "consolidated.00.pth"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: not a file of tensors, or a damaged one: \S"):
        lf.load(folder)


def test_a_file_of_anything_but_named_tensors_is_an_error(folder):
    torch.save([torch.ones(1)], folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: expected a dictionary of tensors, found a list"):
        lf.load(folder)


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_file_of_weights_is_never_run(folder, tmp_path, old_format):
    canary = tmp_path / "canary"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    file = folder / "consolidated.00.pth"
    torch.save({"tok_embeddings.weight": Trap()}, file, _use_new_zipfile_serialization=not old_format)
    for load in (lambda: lf.load(folder), lambda: load_snapshot_pt({}, file)):
        with pytest.raises(ValueError, match=r"consolidated\.00\.pth: not a file of tensors"):
            load()
        assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists()  # proves that the trap works


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no_model: no model there: .*\(stories, stor.*params\.json"):
        lf.load("no_model")
    for file in ("consolidated.00.pth", "params.json"):
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(file)):
            lf.load(folder)


def test_a_tokenizer_that_does_not_fit_is_an_error(folder, texts):
    (folder / "tokenizer.model").write_bytes(lf.train_tokenizer(texts, 402).model)
    with pytest.raises(ValueError, match=r"tokenizer\.model: a vocabulary of 402 tokens does not fit weights for 401"):
        lf.load(folder)


def test_a_name_that_is_a_folder_too_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lf.save(model, "stories")
    with pytest.raises(ValueError, match="is an embedded model and a folder here; for the folder say ./stories"):
        lf.load("stories")
    assert same(lf.load("./stories").params, model.params) and same(lf.load(Path("stories")).params, model.params)


def test_a_file_that_cannot_be_read_is_named(model, folder):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.model").mkdir()
    with pytest.raises(OSError, match="tokenizer.model"):
        lf.load(folder)


def test_more_layers_than_weights_are_refused_before_a_tree_is_made(folder):
    edit_json(folder / "params.json", n_layers=10**9)
    with pytest.raises(ValueError, match="n_layers is 1000000000, but consolidated.00.pth has .* weights"):
        lf.load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float32"])
def test_a_dtype_that_is_none_for_weights_is_an_error(model, folder, tmp_path, dtype):
    for call in (lambda: lf.load(folder, dtype=dtype), lambda: lf.save(model, tmp_path / "new", dtype=dtype)):
        with pytest.raises(ValueError, match=r"dtype must be None \(as stored\) or one of torch\.float16, .*, got "):
            call()
    assert not (tmp_path / "new").exists()
