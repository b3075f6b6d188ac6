"""Hugging Face's layout against transformers itself: its model, its writer and its reader, in memory and in folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import edit_json, same
from hugging_face import logits_of, silence, theirs  # noqa: F401, a fixture
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import SCALINGS, keys, models, scaled, scaled_configs, token_rows, unicode_texts
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

import llama_fn as lf
from llama_fn.checkpoint import huggingface

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS, INDEX, HEAD = "model.safetensors", "model.safetensors.index.json", "lm_head.weight"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a folder. If there is an index, it must name the right file for each."""
    files = {file.name: load_file(file) for file in folder.glob("model*.safetensors")}
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, state in files.items() for name in state}
        assert index["metadata"]["total_size"] == sum(x.nbytes for state in files.values() for x in state.values())
    return {name: x for file in sorted(files) for name, x in sorted(files[file].items())}


def by_name(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(state.items()))


# --- the same numbers


@given(scaled_configs(), keys(), st.booleans())
def test_logits_are_those_of_transformers(config, key, tied):
    model, tokens = theirs(config, key, tied), token_rows(config, 3, 40)
    params = lf.from_hf(model.state_dict(), model.config)
    assert params.config == config and (params.output is params.embedding) == tied
    torch.testing.assert_close(lf.forward(params, tokens)[0], logits_of(model, tokens), atol=1e-4, rtol=0)  # 1e-5 seen


@given(scaled_configs(), keys(), st.integers(1, 15))
def test_decoding_with_a_cache_continues_as_their_whole_forward(config, key, prompt):
    model, tokens = theirs(config, key), token_rows(config, 2, 16)
    params = lf.from_hf(model.state_dict(), model.config)
    cache, pieces = lf.init_cache(config, (2,), max_len=16), []
    for chunk in (tokens[:, :prompt], *tokens[:, prompt:].split(1, -1)):
        logits, cache = lf.forward(params, chunk, cache)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), logits_of(model, tokens), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_at_long_positions_are_those_of_transformers(scaling, theta):
    config = scaled(lf.Config(60, 2, 6, 2, 77, 70, norm_eps=1e-6, rope_theta=theta), scaling)
    model, tokens = theirs(config, lf.random.key(3), sharpness=1.8), token_rows(config, 2, 2500)
    params, expected = lf.from_hf(model.state_dict(), model.config), logits_of(model, tokens)
    torch.testing.assert_close(lf.forward(params, tokens)[0], expected, atol=1e-4, rtol=0)
    _, cache = lf.forward(params, tokens[:, :2480], lf.init_cache(config, (2,), max_len=2500))
    torch.testing.assert_close(lf.forward(params, tokens[:, 2480:], cache)[0], expected[:, 2480:], atol=1e-4, rtol=0)


# --- the same tree


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: models(dtype=dtype)), st.sampled_from(SCALINGS))
def test_from_hf_inverts_to_hf_bit_for_bit(params, scaling):
    params = params._replace(config=scaled(params.config, scaling))
    state, model = lf.to_hf(params), theirs(params.config, lf.random.key(0), dtype=params.norm.dtype)
    model.load_state_dict(state, strict=True)
    assert same(lf.from_hf(state, params.config), params)
    assert same(lf.from_hf(model.state_dict(), model.config), params)
    assert same(lf.from_hf(model.state_dict(), model.config.to_dict()), params)


@given(models(dtype=torch.float32))
def test_wq_and_wk_are_permuted_as_by_their_converter_and_nothing_else(params):
    def permuted(w: torch.Tensor, heads: int) -> torch.Tensor:
        rows, width = w.shape  # the formula of transformers' convert_llama_weights_to_hf.py
        return w.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)

    config, d = params.config, params.config.dim
    expected = {"model.embed_tokens": params.embedding, "model.norm": params.norm, "lm_head": params.output}
    for i, block in enumerate(params.blocks):
        a, f = block.attention, block.feed_forward
        layer = {"self_attn.q_proj": permuted(a.wq.reshape(d, d), config.n_heads),
                 "self_attn.k_proj": permuted(a.wk.reshape(-1, d), config.n_kv_heads),
                 "self_attn.v_proj": a.wv.reshape(-1, d), "self_attn.o_proj": a.wo.reshape(d, d),
                 "mlp.gate_proj": f.w_gate, "mlp.up_proj": f.w_up, "mlp.down_proj": f.w_down,
                 "input_layernorm": block.attention_norm, "post_attention_layernorm": block.ffn_norm}
        expected |= {f"model.layers.{i}.{name}": x for name, x in layer.items()}
    assert same(by_name(lf.to_hf(params)), by_name({f"{name}.weight": x for name, x in expected.items()}))


@given(keys(), st.booleans())
def test_all_but_wq_and_wk_share_memory(key, tied):
    model = theirs(lf.Config(48, 1, 6, 2, 77, 70), key, tied)
    state = model.state_dict()
    again = lf.to_hf(lf.from_hf(state, model.config))
    assert {name for name in state if state[name].data_ptr() != again[name].data_ptr()} == {
        f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk"}


# --- the same files


@given(scaled_configs(vocab_size=401), keys(), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_a_folder_of_transformers_comes_back_bit_for_bit(tmp_path_factory, tokenizer, config, key, dtype, tied, split):
    model, first, second = theirs(config, key, tied, dtype), *(tmp_path_factory.mktemp("hf") for _ in range(2))
    model.save_pretrained(first, max_shard_size="20KB" if split else "1GB")
    (first / "tokenizer.model").write_bytes(tokenizer.model)
    loaded = lf.load(first)
    assert (first / INDEX).exists() == split
    assert same(loaded.params, lf.from_hf(model.state_dict(), model.config)) and loaded.params.config == config
    assert (loaded.params.output is loaded.params.embedding) == tied
    assert same(lf.load(first, dtype=torch.float64).params, lf.tree.map(torch.Tensor.double, loaded.params))
    lf.save(loaded, second, format="hf")
    assert same(by_name(tensors(second)), by_name(tensors(first)))
    if not split:
        assert (second / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()


@given(scaled_configs(vocab_size=401), keys(), st.sampled_from(DTYPES), st.booleans(), st.integers(1, 11) | st.none())
def test_transformers_loads_our_folder_without_a_word(tmp_path_factory, tokenizer, config, key, dtype, tied, shards):
    source, folder = theirs(config, key, tied, dtype), tmp_path_factory.mktemp("hf")
    params = lf.from_hf(source.state_dict(), source.config)
    lf.save(lf.Model(params, tokenizer), folder, format="hf", shards=shards)
    assert len(list(folder.glob("model*.safetensors"))) == (shards or 1)
    assert tensors(folder).keys() == dict(source.named_parameters()).keys()
    assert same(lf.load(folder).params, params)

    model, info = LlamaForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info) and not any(info.values())
    assert model.config.tie_word_embeddings == tied and model.dtype == dtype
    assert same(by_name(model.state_dict()), by_name(source.state_dict()))
    tokens = token_rows(config, 3, 40)
    ours, _ = lf.forward(lf.tree.map(torch.Tensor.float, params), tokens)
    torch.testing.assert_close(ours, logits_of(model.float().eval(), tokens), atol=1e-4, rtol=0)

    settings, written = AutoConfig.from_pretrained(folder).to_dict(), source.config.to_dict()
    mine = {"architectures", "dtype", "_name_or_path", "transformers_version"}
    assert {x: settings[x] for x in settings if x not in mine} == {x: written[x] for x in written if x not in mine}
    assert settings["architectures"] == ["LlamaForCausalLM"]


@given(unicode_texts())
def test_transformers_encodes_as_we_do(hf_tokenizer, tokenizer, text):
    assert hf_tokenizer.encode(text) == tokenizer.encode(text)
    assert hf_tokenizer.model_max_length == 96


@pytest.fixture(scope="module")
def hf_tokenizer(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    lf.save(model, folder, format="hf")
    return AutoTokenizer.from_pretrained(folder)


def test_weights_that_share_memory_are_written(model, tmp_path):
    block = model.params.blocks[0]
    params = model.params._replace(blocks=(block, block._replace(ffn_norm=block.attention_norm), block, block))
    lf.save(lf.Model(params, model.tokenizer), tmp_path, format="hf")
    assert same(lf.load(tmp_path).params, params)


def test_a_large_model_comes_in_several_files(model, tmp_path, monkeypatch):
    total = sum(x.nbytes for x in lf.tree.leaves(model.params))
    monkeypatch.setattr(huggingface, "LARGEST_FILE", total // 4 + 1)
    lf.save(model, tmp_path, format="hf")
    assert len(list(tmp_path.glob("model-0000?-of-00004.safetensors"))) == 4
    assert same(lf.load(tmp_path).params, model.params)
    monkeypatch.setattr(huggingface, "LARGEST_FILE", total)
    lf.save(model, tmp_path, format="hf")
    assert [file.name for file in tmp_path.glob("model*")] == [WEIGHTS]


@pytest.mark.parametrize("count", [0, -1, 40])
def test_files_without_a_weight_are_refused(model, tmp_path, count):
    with pytest.raises(ValueError, match=f"{count} files cannot be made of 39 weights"):
        lf.save(model, tmp_path / "new", format="hf", shards=count)
    assert not (tmp_path / "new").exists()


# --- one matrix or two


@pytest.fixture
def tied(tokenizer, tmp_path) -> Path:
    """A folder of transformers with one matrix as embedding and output."""
    theirs(lf.Config(48, 2, 6, 2, 401, 70), lf.random.key(2), tied=True).save_pretrained(tmp_path / "tied")
    (tmp_path / "tied" / "tokenizer.model").write_bytes(tokenizer.model)
    return tmp_path / "tied"


def test_a_tied_model_has_one_matrix_and_stays_tied(tied, tmp_path):
    loaded = lf.load(tied)
    assert HEAD not in tensors(tied) and loaded.params.output is loaded.params.embedding
    assert (double := lf.load(tied, dtype=torch.float64).params).output is double.embedding
    lf.save(loaded, tmp_path / "again", format="hf")
    assert HEAD not in tensors(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_model_may_have_its_matrix_twice_if_it_is_the_same(tied):
    state = load_file(tied / WEIGHTS)
    embedding = state["model.embed_tokens.weight"]
    save_file({**state, HEAD: embedding.clone()}, tied / WEIGHTS)
    assert (params := lf.load(tied).params).output is params.embedding and torch.equal(params.output, embedding)
    save_file({**state, HEAD: embedding + 1e-3}, tied / WEIGHTS)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, to which tie"):
        lf.load(tied)


def test_two_equal_matrices_that_are_not_tied_stay_two(tied, tmp_path):
    shutil.copytree(tied, tmp_path / "two")
    state = load_file(tied / WEIGHTS)
    save_file({**state, HEAD: state["model.embed_tokens.weight"].clone()}, tmp_path / "two" / WEIGHTS)
    edit_json(tmp_path / "two" / "config.json", tie_word_embeddings=False)
    loaded = lf.load(tmp_path / "two")
    assert loaded.params.output is not loaded.params.embedding
    lf.save(loaded, tmp_path / "again", format="hf")
    assert HEAD in tensors(tmp_path / "again")


def test_a_model_in_the_place_of_its_state_is_an_error():
    for state, config in ((torch.nn.Linear(2, 3), {}), ({}, None)):
        with pytest.raises(ValueError, match=r"from_hf takes a model's state_dict\(\) and its config, got a "):
            lf.from_hf(state, config)
