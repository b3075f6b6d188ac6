"""PEFT's format against PEFT itself on transformers' model: our adapters, PEFT's adapters, and damaged ones."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from adapters import CONFIG, targets, trained
from folders import contents, edit_json, failing, full_disk, same
from hugging_face import silence, theirs  # noqa: F401, a fixture
from hypothesis import given
from hypothesis import strategies as st
from program import cli
from safetensors.torch import load_file, save_file
from strategies import keys, models, random_params, scaled_configs, token_rows
from transformers import LlamaForCausalLM

import llama_fn as lf
from llama_fn import lora, tree
from llama_fn.checkpoint import files

# PEFT uses the old name of a property of transformers, and warns of adapters of tied weights.
pytestmark = [pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
              pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning")]
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w_gate": "gate_proj", "w_up": "up_proj",
         "w_down": "down_proj", "output": "lm_head"}
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def made_by_peft(model, folder: Path, key: torch.Tensor, **how):
    """PEFT's model with an adapter whose B is not zero, written to a folder as PEFT does."""
    from peft import LoraConfig, get_peft_model  # 5 s, which only the slow tests pay

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **how)).eval()
    for i, (name, x) in enumerate(adapted.named_parameters()):
        if "lora_B" in name:
            x.data = lf.random.normal(lf.random.fold_in(key, i), x.shape) / 9
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        adapted.save_pretrained(folder)
    return adapted


# --- both ways


@pytest.mark.slow
@given(scaled_configs(vocab_size=401, max_layers=2), keys(), targets, st.booleans())
def test_peft_loads_our_adapter_on_our_model(tmp_path_factory, tokenizer, config, key, names, tied):
    from peft import PeftModel

    folder, source = tmp_path_factory.mktemp("peft"), theirs(config, key, tied)
    params = lf.from_hf(source.state_dict(), source.config)
    adapter = trained(key, params, 3, names, alpha=7)
    lf.save(lf.Model(params, tokenizer), folder / "model", format="hf")
    lora.save(adapter, folder / "adapter", params)
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    before = logits_of(model, tokens := token_rows(config, 3, 20))
    adapted = PeftModel.from_pretrained(model, folder / "adapter").eval()
    found = {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert len(found) == 2 * len(adapter.matrices)
    ours, _ = lf.forward(lora.apply(params, adapter), tokens)
    torch.testing.assert_close(ours, logits_of(adapted, tokens), atol=1e-4, rtol=0)
    assert (ours - before).abs().max() > 0.01


@pytest.mark.slow
@given(scaled_configs(vocab_size=401, max_layers=2), keys(), targets, st.booleans(), st.integers(1, 40))
def test_we_load_pefts_adapter_on_its_model(tmp_path_factory, config, key, names, root, alpha):
    folder, model = tmp_path_factory.mktemp("peft"), theirs(config, key)
    params = lf.from_hf(model.state_dict(), model.config)
    params = tree.map(torch.clone, params)  # PEFT changes the model
    adapted = made_by_peft(model, folder, key, r=4, lora_alpha=alpha, target_modules=[NAMES[name] for name in names],
                           use_rslora=root)
    adapter, tokens = lora.load(folder, params), token_rows(config, 3, 20)
    assert {path.split(".")[-1] for path in adapter.matrices} == set(names)
    assert adapter.scale.alpha == pytest.approx(alpha * 2 if root else alpha)
    theirs_ = logits_of(adapted, tokens)
    for use in (lora.apply, lora.merge):
        torch.testing.assert_close(lf.forward(use(params, adapter), tokens)[0], theirs_, atol=1e-4, rtol=0)
    assert (lf.forward(params, tokens)[0] - theirs_).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"target_modules": "all-linear"}, {"target_modules": r".*\.1\..*(q|up)_proj"},
                                 {"target_modules": ["v_proj"], "layers_to_transform": [1]},
                                 {"target_modules": ["v_proj", "mlp.up_proj"], "layers_to_transform": 0},
                                 {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
                                 {"target_modules": ["v_proj"], "layers_to_transform": []},
                                 {"target_modules": ["v_proj", "lm_head", "model.layers.1.mlp.up_proj"],
                                  "layers_to_transform": 0},
                                 {"target_modules": ["self_attn.k_proj"], "exclude_modules": ["0.self_attn.k_proj"]},
                                 {"target_modules": ["model.layers.1.mlp.down_proj", "o_proj"]},
                                 {"target_modules": ["q_proj"], "lora_dropout": 0.1, "init_lora_weights": "gaussian"}])
def test_pefts_ways_to_choose_weights_are_understood(tmp_path, how):
    config = lf.Config(48, 2, 6, 2, 77, 70)
    model = theirs(config, lf.random.key(0))
    params = tree.map(torch.clone, lf.from_hf(model.state_dict(), model.config))
    adapted = made_by_peft(model, tmp_path, lf.random.key(1), r=3, **how)
    adapter, tokens = lora.load(tmp_path, params), token_rows(config, 9)
    assert 2 * len(adapter.matrices) == sum(".lora_" in name for name, _ in adapted.named_parameters())
    torch.testing.assert_close(lf.forward(lora.apply(params, adapter), tokens)[0], logits_of(adapted, tokens[None])[0],
                               atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("spelled", [str, Path])
def test_peft_finds_the_model_of_our_adapter_by_itself(tmp_path, monkeypatch, tokenizer, spelled):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = lf.Config(48, 2, 6, 2, 401, 70)
    params = lf.from_hf(theirs(config, lf.random.key(0)).state_dict(), config)
    adapter, tokens = trained(lf.random.key(1), params, 3, ("wq", "w_up"), alpha=7), token_rows(config, 2, 9)
    lf.save(lf.Model(params, tokenizer), tmp_path / "model", format="hf")
    lora.save(adapter, tmp_path / "adapter", params, spelled(tmp_path / "model"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "model")
    ours, _ = lf.forward(lora.apply(params, adapter), tokens)
    torch.testing.assert_close(ours, logits_of(model, tokens), atol=1e-4, rtol=0)
    assert same(lora.load(tmp_path / "adapter", params), adapter)
    with pytest.raises(ValueError, match="base is empty"):
        lora.save(adapter, tmp_path / "new", params, "")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layers, kept", [(0, [0]), ([0], [0]), (1, [1]), ([1, 0], [0, 1]), ([], [0, 1]),
                                          (None, [0, 1])])
def test_the_layers_to_transform_are_those_that_are_read(tmp_path, layers, kept):
    params = random_params(lf.Config(48, 2, 6, 2, 77, 70), lf.random.key(0), torch.float32)
    names = [f"blocks.{layer}.attention.wq" for layer in kept]
    adapter = trained(lf.random.key(1), params, 3, names)
    lora.save(adapter, tmp_path, params)
    edit_json(tmp_path / SETTINGS, target_modules=["q_proj"], layers_to_transform=layers)
    assert same(lora.load(tmp_path, params), adapter)
    if len(kept) == 1:  # and a weight of another layer is one too many, or one too few
        edit_json(tmp_path / SETTINGS, layers_to_transform=1 - kept[0])
        with pytest.raises(ValueError, match=rf"(?s)missing: .*layers\.{1 - kept[0]}.*unknown: .*layers\.{kept[0]}"):
            lora.load(tmp_path, params)


def test_an_alpha_of_zero_is_a_number(tmp_path, params):
    adapter = trained(lf.random.key(1), params, 3, ("wq",))
    lora.save(adapter, tmp_path, params)
    edit_json(tmp_path / SETTINGS, lora_alpha=0)
    assert lora.load(tmp_path, params).scale.alpha == 0
    tokens = token_rows(params.config, 9)
    assert torch.equal(lf.forward(lora.merge(params, lora.load(tmp_path, params)), tokens)[0],
                       lf.forward(params, tokens)[0])


@given(models(), keys(), targets, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_an_adapter_comes_back_bit_for_bit(tmp_path_factory, params, key, names, dtype, data):
    able = lora.init(key, params, 1, names).matrices
    some = data.draw(st.lists(st.sampled_from(sorted(able)), min_size=1, unique=True))  # not in every layer
    adapter, folder = trained(key, params, 3, some, 2.5, dtype), tmp_path_factory.mktemp("peft")
    lora.save(adapter, folder, params)
    assert same(lora.load(folder, params), adapter)
    assert {file.name for file in folder.iterdir()} == {SETTINGS, WEIGHTS}
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # both files have the same permissions


@pytest.mark.slow
def test_the_settings_are_those_that_peft_writes_itself(tmp_path):
    from peft import LoraConfig

    params = random_params(lf.Config(48, 2, 6, 2, 77, 70), lf.random.key(0))
    adapter = trained(lf.random.key(1), params, 3, ["wq", "blocks.1.feed_forward.w_up", "output"], alpha=16)
    lora.save(adapter, tmp_path, params)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    assert settings["target_modules"] == ["lm_head", "model.layers.1.mlp.up_proj", "q_proj"]
    assert settings["r"] == 3 and settings["lora_alpha"] == 16 and type(settings["lora_alpha"]) is int
    theirs = LoraConfig(task_type="CAUSAL_LM", inference_mode=True).to_dict()
    others = settings.keys() - {"r", "lora_alpha", "target_modules"}
    assert {name: settings[name] for name in others} == {name: theirs[name] for name in others}
    assert load_file(tmp_path / WEIGHTS)[f"{Q}B.weight"].shape == (48, 3)


def test_matrices_that_share_memory_are_written(tmp_path):
    params = random_params(CONFIG, lf.random.key(0))
    adapter = trained(lf.random.key(1), params, 3, ("w_gate", "w_up"))
    shared = next(iter(adapter.matrices.values())).a
    adapter = adapter._replace(matrices={path: x._replace(a=shared) for path, x in adapter.matrices.items()})
    lora.save(adapter, tmp_path, params)
    assert same(lora.load(tmp_path, params), adapter)


# --- what is no plain LoRA, and what does not fit


@pytest.fixture
def params() -> lf.Params:
    return random_params(CONFIG, lf.random.key(0), torch.float32)


@pytest.fixture
def folder(params, tmp_path) -> Path:
    lora.save(trained(lf.random.key(1), params, 3, ("wq", "w_down", "output")), tmp_path / "adapter", params)
    return tmp_path / "adapter"


@pytest.mark.parametrize("change", [
    {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}, {"modules_to_save": ["embed"]},
    {"rank_pattern": {"q_proj": 5}}, {"alpha_pattern": {"q_proj": 5}},
    {"alpha_pattern": {"q_proj": 0}}, {"fan_in_fan_out": True}, {"peft_type": "IA3"},
    {"init_lora_weights": "pissa"}, {"layer_replication": [[0, 1]]}, {"target_parameters": ["x"]},
    {"task_type": "SEQ_CLS"}, {"trainable_token_indices": [3]}, {"what_comes_next": 1}, {"peft_type": ...}])
def test_what_is_no_plain_lora_is_refused_by_name(folder, params, change):
    edit_json(folder / SETTINGS, **change)
    name, = change
    with pytest.raises(ValueError, match=f"_config.json: {name} is .*: that is not plain LoRA, .*; let PEFT merge"):
        lora.load(folder, params)
    edit_json(folder / SETTINGS, **{name: "LORA" if name == "peft_type" else None if name != "bias" else "none"})
    lora.load(folder, params)


@pytest.mark.parametrize("change, message", [
    ({"r": 0}, "r should be an integer of at least 1, is 0"), ({"r": "3"}, "is '3'"), ({"r": True}, "is True"),
    ({"r": ...}, "is None"), ({"r": 10**400}, r"is 10+\.\.\."), ({"lora_alpha": "x"}, "lora_alpha should be a number"),
    ({"lora_alpha": float("nan")}, "is nan"), ({"lora_alpha": 10**400}, r"is 10+\.\.\."),
    ({"lora_alpha": None}, "is None"),
    ({"r": 4}, r"q_proj.lora_A.weight in adapter_model.safetensors: should be \[4, 48\], is float32\[3, 48\]"),
    ({"target_modules": ["q_proj"]}, r"(?s)4 weights .*unknown: base_model.model.lm_head.lora_A.weight in"),
    ({"target_modules": ["q_proj", "down_proj", "lm_head", "k_proj"]}, "2 weights .*\n  missing: .*k_proj.lora_A"),
    ({"target_modules": ["c_attn"]}, r"target_modules names no weight of the model: \['c_attn'\]"),
    ({"layers_to_transform": "0"}, "_config.json: layers_to_transform should be a layer or a list of layers, is '0'"),
    ({"layers_to_transform": True}, "is True"), ({"layers_to_transform": [0, None]}, "is .0, None."),
    ({"layers_to_transform": 9, "target_modules": ["q_proj"]}, "names no weight of the model in the layers 9: "),
    ({"target_modules": []}, "names no weight"), ({"target_modules": [["q_proj"]]}, "names no weight"),
])
def test_settings_with_holes_and_nonsense_are_refused(folder, params, change, message):
    edit_json(folder / SETTINGS, **change)
    with pytest.raises(ValueError, match=message):
        lora.load(folder, params)


@pytest.mark.parametrize("change, message", [
    ({f"{Q}A.weight": None}, f"1 weights of the adapter .*\n  missing: {Q}A.weight"),
    ({f"{Q}C.weight": torch.zeros(2)}, f"unknown: {Q}C.weight"),
    ({f"{Q}B.weight": torch.zeros(48, 4)}, r"should be \[48, 3\], is float32\[48, 4\]"),
    ({f"{Q}B.weight": torch.zeros(48, 3, dtype=torch.int64)}, r"should be \[48, 3\], is I64"),
    ({"base_model.model.lm_head.weight": torch.zeros(77, 48)}, "unknown: base_model.model.lm_head.weight"),
    ({"base_model.model.lm_head.base_layer.weight": torch.zeros(77, 48)}, "is not the output of this model"),
    ({"base_model.model.lm_head.base_layer.weight": torch.zeros(78, 48)}, r"should be \[77, 48\], is float32"),
    ({f"{Q}magnitude_vector": torch.zeros(48)}, "unknown"),
])
def test_weights_that_do_not_fit_are_named(folder, params, change, message):
    state = load_file(folder / WEIGHTS) | change
    save_file({name: x for name, x in state.items() if x is not None}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        lora.load(folder, params)


def test_an_adapter_of_another_model_is_refused(folder):
    other = random_params(lf.Config(60, 1, 6, 2, 77, 70), lf.random.key(0))
    with pytest.raises(ValueError, match=r"4 weights of the adapter do not fit .*\n.*should be \[3, 60\], is float32"):
        lora.load(folder, other)


def test_missing_damaged_and_pickled_files_are_refused(folder, params, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.adapter_config.json: no such file"):
        lora.load(tmp_path / "nowhere", params)
    whole = contents(folder)
    for name in (SETTINGS, WEIGHTS):
        for damaged in (whole[name][:len(whole[name]) // 2], b"", b"\xff" * 50):
            (folder / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name}: not "):
                lora.load(folder, params)
        (folder / name).write_bytes(whole[name])
    os.replace(folder / WEIGHTS, tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"a link to .*elsewhere, outside the folder"):
        lora.load(folder, params)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: no such file"):
        lora.load(folder, params)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match=r"adapter_model.bin: not a file of tensors"):
        lora.load(folder, params)


def test_an_older_file_of_an_adapter_is_read(folder, params):
    adapter = lora.load(folder, params)
    state = load_file(folder / WEIGHTS)
    torch.save({name: torch.nn.Parameter(x) for name, x in state.items()}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert same(lora.load(folder, params), adapter)
    assert not any(x.requires_grad for x in tree.leaves(lora.load(folder, params)))
    save_file({name: x + 1 for name, x in state.items()}, folder / WEIGHTS)
    assert not same(lora.load(folder, params), adapter)  # and safetensors come first


def test_what_cannot_be_written_is_refused_and_nothing_is_written(model, params, tmp_path):
    mixed = trained(lf.random.key(0), params, 3, ("wq",))
    mixed.matrices.update(trained(lf.random.key(0), params, 2, ("wv",)).matrices)
    with pytest.raises(ValueError, match="an adapter of one rank can be written, this one has 2, 3"):
        lora.save(mixed, tmp_path / "new", params)
    with pytest.raises(ValueError, match="this one has none"):
        lora.save(mixed._replace(matrices={}), tmp_path / "new", params)
    assert not list(tmp_path.iterdir())
    lf.save(model, tmp_path / "model", format="hf")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"model: a model lies there \(config.json\)"):
        lora.save(trained(lf.random.key(0), model.params), tmp_path / "model", model.params)
    assert contents(tmp_path) == before


def test_a_failed_save_leaves_the_old_adapter_whole(folder, params, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(files, "save_file", failing(files.save_file, full_disk()))
    with pytest.raises(OSError, match="No space left"):
        lora.save(trained(lf.random.key(5), params, 2, ("wv",)), folder, params)
    assert contents(folder) == before
    monkeypatch.undo()
    (folder / "adapter_model.bin").touch()  # an old one, which PEFT would not read any more
    lora.save(trained(lf.random.key(5), params, 2, ("wv",)), folder, params)
    assert contents(folder).keys() == before.keys() and contents(folder) != before


# --- the command line


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: cli(monkeypatch, capsys, *map(str, args))


def test_generate_and_convert_merge_an_adapter(run):
    told = lf.load("stories")
    adapter = trained(lf.random.key(1), told.params, 2, ("wv", "w_up", "output"))
    merged = lora.merge(told.params, adapter)
    lora.save(adapter, "adapter", told.params)
    status, out, _ = run("generate", "Long ago", "--adapter", "adapter", "--greedy", "--max-new-tokens", 12)
    how = {"key": lf.random.key(0), "max_new_tokens": 12, "sampler": lf.sampler(0.0), "echo": True}
    text, = lf.text_completion(lf.Model(merged, told.tokenizer), ["Long ago"], **how)
    plain, = lf.text_completion(told, ["Long ago"], **how)
    assert status == 0 and out == text.text + "\n" and text.text != plain.text
    assert run("convert", "stories", "new", "--to", "hf", "--adapter", "adapter")[0] == 0
    assert same(lf.load("new").params, merged)


def test_convert_unties_a_model_whose_output_is_adapted(run, tokenizer):
    source = theirs(lf.Config(48, 1, 6, 2, 401, 70), lf.random.key(0), tied=True)
    params = lf.from_hf(source.state_dict(), source.config)
    adapter = trained(lf.random.key(1), params, 2, ("output",))
    lf.save(lf.Model(params, tokenizer), "tied", format="hf")
    lora.save(adapter, "adapter", params)
    assert run("convert", "tied", "new", "--to", "hf", "--adapter", "adapter")[0] == 0
    assert same(lf.load("new").params, lora.merge(params, adapter))


@pytest.mark.parametrize("args", [("generate", "--model", "stories"), ("chat", "stories"),
                                  ("convert", "stories", "new", "--to", "hf")])
def test_an_adapter_that_is_not_there_is_one_line(run, args, tmp_path):
    status, out, err = run(*args, "--adapter", "nowhere")
    assert status == 2 and not out and err == "llama-fn: nowhere/adapter_config.json: no such file\n"
    assert not list(tmp_path.iterdir())
