"""Variants of Hugging Face's folders: older files of weights, Mistral, larger vocabularies, no tokenizer."""

import json
import math
from pathlib import Path

import pytest
import torch
from folders import edit_json, same
from hugging_face import logits_of, silence, theirs  # noqa: F401, a fixture
from hypothesis import given
from hypothesis import strategies as st
from program import cli
from safetensors.torch import load_file, save_file
from strategies import configs, keys, random_params, token_rows, unicode_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

import llama_fn as lf
from llama_fn.checkpoint.hf_config import read_config, write_config
from llama_fn.generation import conversation
from llama_fn.tokenizer_json import added_tokens

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def folder(model, tmp_path) -> Path:
    lf.save(model, tmp_path / "model", format="hf")
    return tmp_path / "model"


def pickled(folder: Path, count: int = 1) -> None:
    """The weights in `pytorch_model.bin`, or in several files and an index."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if count == 1:
        torch.save(state, folder / PICKLE)
        return
    index = {}
    for i in range(count):
        name = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        part = dict(list(state.items())[i::count])
        torch.save(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / PICKLE_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


# --- older files of weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 3])
def test_older_files_of_weights_are_read_as_by_transformers(model, folder, count, dtype):
    lf.save(model, folder, format="hf", dtype=dtype)
    expected = lf.load(folder)
    pickled(folder, count)
    assert same(lf.load(folder), expected)
    assert same(lf.load(folder, dtype=torch.float64).params, lf.tree.map(torch.Tensor.double, expected.params))
    tokens = token_rows(model.params.config, 2, 20)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, _ = lf.forward(lf.load(folder, dtype=torch.float32).params, tokens)
    torch.testing.assert_close(ours, logits_of(other, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_safetensors_come_before_older_files(model, folder, count):
    pickled(folder, count)
    params = lf.tree.map(lambda x: x + 1, model.params)
    for name in (WEIGHTS, INDEX):
        other = folder.parent / name
        lf.save(model._replace(params=params), other, format="hf", shards=1 if name == WEIGHTS else 2)
        for file in folder.glob("pytorch_model*"):
            (other / file.name).write_bytes(file.read_bytes())
        assert same(lf.load(other).params, params)


def test_what_is_missing_of_older_files_is_named(folder):
    pickled(folder, 3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00003\.bin: no such file"):
        lf.load(folder)
    index = (folder / PICKLE_INDEX).read_bytes()
    (folder / PICKLE_INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00003\.bin is one file of several, and .* is missing"):
        lf.load(folder)
    (folder / PICKLE_INDEX).write_bytes(index)
    torch.save({}, folder / PICKLE)
    with pytest.raises(ValueError, match=rf"both {PICKLE} and {PICKLE_INDEX} tell where the weights are"):
        lf.load(folder)


def test_saving_over_a_folder_leaves_none_of_its_older_files(model, folder):
    pickled(folder, 2)
    for name in (PICKLE, "added_tokens.json", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    (folder / "README.md").touch()
    lf.save(model, folder, format="hf")
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "config.json", WEIGHTS, "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json"}


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "nowhere.safetensors"])
def test_an_index_may_name_frequencies_that_no_file_has(model, folder, file):
    lf.save(model, folder, format="hf", shards=2)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=index | {FREQUENCIES: file})
    assert same(lf.load(folder).params, model.params)


def test_an_index_may_name_frequencies_that_a_file_has(model, folder):
    pickled(folder, 2)
    first = folder / "pytorch_model-00001-of-00002.bin"
    torch.save({**torch.load(first), FREQUENCIES: torch.ones(4)}, first)
    index = json.loads((folder / PICKLE_INDEX).read_text())["weight_map"]
    edit_json(folder / PICKLE_INDEX, weight_map=index | {FREQUENCIES: first.name})
    assert same(lf.load(folder).params, model.params)


# --- Mistral


@given(configs(vocab_size=401), keys(), st.sampled_from([None, 64, 65]))
def test_mistral_without_a_window_is_llama(tmp_path_factory, config, key, window):
    folder, source = tmp_path_factory.mktemp("mistral"), theirs(config, key)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
             "intermediate_size", "rms_norm_eps", "max_position_embeddings", "rope_parameters")
    model = MistralForCausalLM(MistralConfig(**{name: getattr(source.config, name) for name in names},
                                             sliding_window=window)).eval()
    model.load_state_dict(source.state_dict())
    model.save_pretrained(folder)
    loaded = lf.load(folder)
    assert loaded.params.config == config and loaded.tokenizer is None
    tokens = token_rows(config, 3, 40)
    torch.testing.assert_close(lf.forward(loaded.params, tokens)[0], logits_of(model, tokens), atol=1e-4, rtol=0)
    assert same(lf.from_hf(model.state_dict(), model.config), loaded.params)


@given(st.sets(st.sampled_from(["num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_theta",
                                "rope_scaling", "rope_parameters", "tie_word_embeddings", "head_dim", "hidden_act",
                                "torch_dtype"])))
def test_what_mistral_leaves_out_is_what_transformers_takes(names):
    config = lf.Config(128, 2, 16, 4, 77, 70)
    settings = {name: x for name, x in write_config(config, True, torch.float16).items() if name not in names}
    settings |= {"model_type": "mistral", "sliding_window": None}
    full = MistralConfig(**settings).to_dict()
    ours, tied = read_config(settings, "config.json")
    assert (tied, ours.n_kv_heads, ours.norm_eps, ours.max_seq_len, ours.head_dim, ours.rope_theta) == (
        full["tie_word_embeddings"], full["num_key_value_heads"], full["rms_norm_eps"],
        full["max_position_embeddings"], full["head_dim"], full["rope_parameters"]["rope_theta"])


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_the_name_of_the_class_tells_the_type(model, folder, kind):
    edit_json(folder / "config.json", model_type=..., architectures=[f"{kind}ForCausalLM"], sliding_window=95)
    if kind == "Llama":
        assert same(lf.load(folder).params, model.params)
    else:
        with pytest.raises(ValueError, match="sliding_window is 95"):
            lf.load(folder)


# --- larger vocabularies


ADDED = {401: ("<X>", False), 402: ("<|end|>", True), 404: ("<XY>", False)}


def larger(model: lf.Model, rows: int) -> lf.Model:
    """A model with more rows than its tokenizer has tokens."""
    config = lf.Config(48, 1, 6, 2, rows, 70, max_seq_len=96)
    return lf.Model(random_params(config, lf.random.key(3), torch.float32), model.tokenizer)


@pytest.mark.parametrize("format", ["meta", "hf", "llama2c"])
@pytest.mark.parametrize("more", [1, 16, 64])
def test_rows_beyond_the_tokenizer_are_tokens_without_a_name(model, tmp_path, more, format):
    wide = larger(model, 401 + more)
    lf.save(wide, tmp_path, format=format)
    loaded = lf.load(tmp_path)
    assert same(loaded.params, wide.params) and loaded.tokenizer.vocab_size == 401 + more
    assert loaded.tokenizer.encode("the cat", special=True) == model.tokenizer.encode("the cat")
    ids = model.tokenizer.encode("the cat")
    assert loaded.tokenizer.decode([401, *ids, 400 + more]) == "the cat" == loaded.tokenizer.decode(ids)
    last = lf.text_completion(loaded, ["the"], key=lf.random.key(0), max_new_tokens=5,
                              sampler=lambda key, logits, tokens: torch.tensor(400 + more))
    assert last[0].tokens == [400 + more] * 5 and last[0].text == ""
    again = tmp_path / "again"
    lf.save(loaded, again, format=format)
    assert same(lf.load(again), loaded)


@pytest.fixture
def added(model, tmp_path) -> Path:
    """A folder with three added tokens, a gap, and padding."""
    lf.save(larger(model, 408), tmp_path / "added", format="hf")
    (tmp_path / "added" / "tokenizer.json").unlink()
    return tmp_path / "added"


def decoder(names: dict[int, tuple[str, bool]]) -> dict:
    return {str(id): {"content": name, "special": special} for id, (name, special) in names.items()}


def put_decoder(folder: Path) -> None:
    basic = {0: ("<unk>", True), 1: ("<s>", True), 2: ("</s>", True)}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder({**basic, **ADDED}))


def put_older(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({name: id for id, (name, _) in ADDED.items()}))
    (folder / "special_tokens_map.json").write_text(json.dumps(
        {"additional_special_tokens": ["<|end|>"], "bos_token": {"content": "<s>"}, "pad_token": "</s>"}))


def put_json(folder: Path) -> None:
    listed = [{"id": id, "content": name, "special": special} for id, (name, special) in ADDED.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}))


@pytest.mark.parametrize("put", [put_decoder, put_older, put_json])
def test_added_tokens_are_known_by_name(added, model, put):
    put(added)
    tokenizer = lf.load(added).tokenizer
    names = {id: ADDED.get(id, ("",))[0] for id in range(401, 408)}
    assert tokenizer.added == tuple(names.items()) and tokenizer.special == (402,)
    text = "the<XY> cat<|end|><X>"
    assert tokenizer.encode(text) == model.tokenizer.encode(text)  # names of tokens in a user's text stay text
    ids = tokenizer.encode(text, special=True)
    assert [id for id in ids if id > 400] == [404, 402, 401]
    assert tokenizer.decode(ids).replace("  ", " ") == "the<XY> cat<X>"
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("format", ["meta", "hf", "llama2c"])
def test_added_tokens_survive_in_every_format(added, tmp_path, format):
    put_decoder(added)
    loaded = lf.load(added)
    lf.save(loaded, tmp_path / "new", format=format)
    again = lf.load(tmp_path / "new")
    named = {id: name for id, name in again.tokenizer.added if name}
    assert same(again, loaded) and named == {id: name for id, (name, _) in ADDED.items()}
    if format == "hf":
        other = AutoTokenizer.from_pretrained(tmp_path / "new")
        text = "the<XY> cat<|end|><X>"
        assert other.encode(text) == loaded.tokenizer.encode(text, special=True) == again.tokenizer.encode(text,
                                                                                                          special=True)


@given(unicode_texts())
def test_names_are_text_unless_asked_for(model, text):
    tokenizer = lf.Tokenizer(model.tokenizer.model, ((401, "<X>"), (402, "")), (401,))
    assert tokenizer.encode(f"<X>{text}</s>") == model.tokenizer.encode(f"<X>{text}</s>")
    ids = tokenizer.encode(f"<X>{text}</s>", special=True)
    assert ids[:2] == [1, 401] and ids[-1] == 2 and ids[2:-1] == model.tokenizer.encode(text, bos=False)


def test_more_tokens_than_rows(added, model):
    names = decoder({401: ("<X>", False), 408: ("<pad>", True)})
    edit_json(added / "tokenizer_config.json", added_tokens_decoder=names)
    with pytest.warns(UserWarning, match=r"the weights have 408 rows, so 1 added tokens are left out: '<pad>' \(408\)"):
        assert lf.load(added).tokenizer.vocab_size == 408


@pytest.mark.parametrize("id", [math.inf, -math.inf, math.nan, 1.5, True, -1, "1", None, [1]])
def test_an_added_token_without_a_whole_number_is_refused(added, id):
    """`json` reads 1e400 as infinity."""
    (added / "added_tokens.json").write_text(json.dumps({"<X>": id}))
    with pytest.raises(ValueError, match="the added tokens of tokenizer_config.json, .* cannot be read"):
        lf.load(added)
    (added / "added_tokens.json").unlink()
    edit_json(added / "tokenizer_config.json", added_tokens_decoder={"x": 5})
    with pytest.raises(ValueError, match="the added tokens of tokenizer_config.json, .* cannot be read"):
        lf.load(added)
    content = {"added_tokens": [{"id": id, "content": "<X>"}]}
    with pytest.raises(ValueError, match='"added_tokens"'):
        added_tokens(content)


def test_code_llama_puts_a_space_before_the_first_part_alone(model, tmp_path):
    """Its files do not set "legacy", which transformers takes as false."""
    lf.save(larger(model, 408), tmp_path, format="hf")
    (tmp_path / "tokenizer.json").unlink()
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="CodeLlamaTokenizer", legacy=None,
              add_prefix_space=...)
    tokenizer, other = lf.load(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the</s>cat", "</s>the cat", "the cat"):
        assert tokenizer.encode(text, special=True) == other.encode(text)


# --- no tokenizer


@pytest.fixture
def silent(model, tmp_path) -> lf.Model:
    """A model of a folder without a tokenizer."""
    lf.save(model._replace(tokenizer=None), tmp_path / "silent", format="hf")
    return lf.load(tmp_path / "silent")


@pytest.mark.parametrize("format", ["meta", "hf", "llama2c"])
def test_weights_are_loaded_and_saved_without_a_tokenizer(model, tmp_path, format):
    lf.save(model, tmp_path, format=format)
    bare = model._replace(tokenizer=None)
    lf.save(bare, tmp_path, format=format)  # the old model's tokenizer is removed
    assert not list(tmp_path.glob("*token*"))
    assert lf.load(tmp_path).tokenizer is None and same(lf.load(tmp_path).params, model.params)


@pytest.mark.parametrize("use", [
    lambda m, key: lf.text_completion(m, ["a"], key=key), lambda m, key: lf.stream(m, "a", key=key),
    lambda m, key: lf.chat_completion(m, [[{"role": "user", "content": "a"}]], key=key),
    lambda m, key: lf.score(m, ["a"]), lambda m, key: lf.score_options(m, "a", ["b", "c"]),
    lambda m, key: lf.perplexity(m, "a"), lambda m, key: lf.speculate(m, m, ["a"], key=key),
    lambda m, key: lf.speculate_stream(m, m, "a", key=key), lambda m, key: conversation.ask(m, lf.Chat(), "a"),
    lambda m, key: conversation.answer(m, lf.Chat(), key=key), lambda m, key: conversation.drop(m, lf.Chat(), 0),
    lambda m, key: conversation.with_system(m, lf.Chat(), "a")])
def test_what_needs_a_tokenizer_says_how_to_give_one(silent, use):
    with pytest.raises(ValueError, match=r"has no tokenizer, .*: model\._replace\(tokenizer=lf\.load_tok"):
        use(silent, lf.random.key(0))


def test_convert_and_inspect_work_without_a_tokenizer(silent, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, _ = cli(monkeypatch, capsys, "inspect", "silent")
    assert status == 0 and f"{'tokenizer':<16}none\n" in out
    assert cli(monkeypatch, capsys, "convert", "silent", "new", "--to", "meta")[0] == 0
    assert same(lf.load("new").params, model.params) and lf.load("new").tokenizer is None
    for command in (("generate", "a", "--model", "silent"), ("chat", "silent"),
                    ("choose", "a", "b", "c", "--model", "silent"), ("evaluate", "silent")):
        status, _, err = cli(monkeypatch, capsys, *command)
        assert status == 2 and err.startswith("llama-fn: the model has no tokenizer") and err.count("\n") == 1


def test_inspect_tells_of_added_tokens(added, tmp_path, monkeypatch, capsys):
    put_decoder(added)
    status, out, _ = cli(monkeypatch, capsys, "inspect", str(added))
    assert status == 0 and f"{'tokenizer':<16}401 tokens and 3 added\n" in out


def test_safetensors_without_their_index_are_named(model, folder):
    lf.save(model, folder, format="hf", shards=2)
    (folder / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors is one file of several"):
        lf.load(folder)
    save_file({}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="layers, but there are 0 weights"):
        lf.load(folder)
