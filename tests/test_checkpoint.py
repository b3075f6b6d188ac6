import dataclasses
import errno
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, keys

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint import meta
from llama_fn.checkpoint.snapshot import load_snapshot, save_snapshot

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The released params.json files; 13B's and 70B's tell the vocabulary, and all rely on defaults for the rest.
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


def bits(x: torch.Tensor) -> tuple:
    return x.dtype, x.shape, x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(a, b) -> bool:
    """Bit for bit, and in the same structure."""
    return tree.structure(a) == tree.structure(b) and all(
        bits(x) == bits(y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def edit_settings(folder: Path, **changes) -> None:
    settings = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps({name: x for name, x in settings.items() if x != "missing"}))


def edit_weights(folder: Path, **changes) -> None:
    """Each change by a weight's last but one name in layer 0: a function of the weight, or None to leave it out."""
    state = torch.load(folder / "consolidated.00.pth")
    for name, change in changes.items():
        path = next(p for p in state if p.split(".")[-2] == name)
        weight = state.pop(path)
        if change is not None:
            state[path] = change(weight)
    torch.save(state, folder / "consolidated.00.pth")


@given(keys(), configs(), st.sampled_from(DTYPES))
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path_factory, key, config, dtype):
    params, folder = lf.init_params(key, config, dtype), tmp_path_factory.mktemp("meta")
    meta.save_meta(params, folder)
    assert same(meta.load_meta(folder), params)
    assert same(meta.load_meta(folder, torch.float64), tree.map(torch.Tensor.double, params))


def test_a_model_is_loaded_with_its_tokenizer(model, folder):
    again = lf.load(folder)
    assert same(again.params, model.params) and again.tokenizer == model.tokenizer
    assert sorted(os.listdir(folder)) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")  # where Meta's download has it
    assert lf.load(str(folder)).tokenizer == model.tokenizer


@given(keys(), configs())
def test_metas_weights_are_ours_without_the_axes_of_heads(tmp_path_factory, key, config):
    params, folder = lf.init_params(key, config), tmp_path_factory.mktemp("meta")
    meta.save_meta(params, folder)
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
    edit_weights(folder, wq=torch.nn.Parameter)
    for x in tree.leaves(lf.load(folder).params):
        assert type(x) is torch.Tensor and not x.requires_grad


@given(configs(), st.integers(1, 2) | st.integers(1, 5000))
def test_every_hidden_width_survives_its_settings(config, hidden_dim):
    """Meta's file tells it in a roundabout way: 2/3 of 4 d, times one number, rounded up to a multiple of another."""
    config = dataclasses.replace(config, hidden_dim=hidden_dim)
    assert meta.read_config(json.loads(json.dumps(meta.write_config(config))), {}, "") == config


@pytest.mark.parametrize("config, settings", RELEASED, ids=["7B", "13B", "70B"])
def test_the_released_settings_give_the_released_sizes(config, settings):
    assert meta.read_config(settings, {}, "params.json") == config


def test_what_the_settings_leave_out_is_a_default_or_in_the_weights(folder, model):
    config = dataclasses.replace(model.params.config, max_seq_len=4096)
    edit_settings(folder, vocab_size=-1, max_seq_len="missing", norm_eps="missing", rope_theta="missing")
    assert lf.load(folder).params.config == config
    edit_settings(folder, vocab_size="missing")
    assert lf.load(folder).params.config == config
    settings = {"dim": 48, "n_layers": 1, "n_heads": 6}
    assert meta.read_config(settings, {}, "").n_kv_heads == meta.read_config(settings | {"n_kv_heads": None}, {},
                                                                             "").n_kv_heads == 6


@pytest.mark.parametrize("changes, message", [
    ({"dim": "missing", "n_heads": "missing"}, "dim, n_heads missing"),
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
    edit_settings(folder, **changes)
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
    edit_weights(folder, wq=None, w1=lambda x: x.T, norm=lambda x: x[:-1], w3=lambda x: x.int(), wo=lambda x: 5)
    state = torch.load(folder / "consolidated.00.pth")
    torch.save(state | {"lm_head.weight": torch.ones(1), "rope.freqs": torch.ones(1)}, folder / "consolidated.00.pth")
    with pytest.raises(ValueError) as error:
        lf.load(folder)
    first, *lines = str(error.value).split("\n")
    assert first == f"{folder / 'consolidated.00.pth'}: 6 weights do not fit the settings:"
    assert sorted(line.strip() for line in lines) == [
        "layers.0.attention.wo.weight: should be [48, 48], is int",
        "layers.0.feed_forward.w1.weight: should be [70, 48], is torch.float32[48, 70]",
        "layers.0.feed_forward.w3.weight: should be [70, 48], is torch.int32[70, 48]",
        "missing: layers.0.attention.wq.weight",
        "norm.weight: should be [48], is torch.float32[47]",
        "unknown: lm_head.weight",
    ]


@pytest.mark.parametrize("embedding", [torch.tensor(1.0), 5, torch.ones(401)], ids=["scalar", "number", "vector"])
def test_an_embedding_that_is_no_matrix_is_named(folder, embedding):
    edit_settings(folder, vocab_size=-1)
    edit_weights(folder, tok_embeddings=lambda x: embedding)
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight: should be"):
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
    for load in (lambda: lf.load(folder), lambda: load_snapshot({}, file)):
        with pytest.raises(ValueError, match=r"consolidated\.00\.pth: not a file of tensors"):
            load()
        assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists()  # the trap was a real one


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no_model: no model there: .*\(stories\).*params\.json"):
        lf.load("no_model")
    for file in ("consolidated.00.pth", "tokenizer.model", "params.json"):
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(file)):
            lf.load(folder)


def test_a_tokenizer_that_does_not_fit_is_an_error(folder, texts):
    (folder / "tokenizer.model").write_bytes(lf.train_tokenizer(texts, 400).model)
    with pytest.raises(ValueError, match=r"tokenizer\.model: a vocabulary of 400 tokens does not fit weights for 401"):
        lf.load(folder)


def test_several_shards_are_an_error(folder):
    (folder / "consolidated.01.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="weights in 2 shards"):
        lf.load(folder)


def test_an_unknown_format_is_an_error_and_writes_nothing(model, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'gguf'"):
        lf.save(model, tmp_path / "new", format="gguf")
    assert not (tmp_path / "new").exists()


def full_disk(write):
    """`write`, but only half of it arrives."""
    def half(*args, **kwargs):
        write(*args, **kwargs)
        file = next(Path(x) for x in args if isinstance(x, Path))
        os.truncate(file, file.stat().st_size // 2)
        raise OSError(errno.ENOSPC, "No space left on device", str(file))
    return half


@pytest.mark.parametrize("owner, write", [(torch, "save"), (Path, "write_text"), (Path, "write_bytes")])
def test_a_failed_write_leaves_the_old_files_whole_and_no_part(model, folder, monkeypatch, owner, write):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(owner, write, full_disk(getattr(owner, write)))
    with pytest.raises(OSError, match="No space left"):
        lf.save(lf.Model(tree.map(lambda x: x + 1, model.params), model.tokenizer), folder)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert same(lf.load(folder).params, model.params)


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
    settings = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**settings, "n_layers": 10**9}))
    with pytest.raises(ValueError, match="n_layers is 1000000000, but consolidated.00.pth has .* weights"):
        lf.load(folder)


# --- snapshots

leaves = st.builds(lambda first, shape, dtype: (first + torch.arange(math.prod(shape))).reshape(shape).to(dtype),
                   st.integers(-2**40, 2**40), st.lists(st.integers(0, 4), max_size=3).map(tuple),
                   st.sampled_from([*DTYPES, torch.float64, torch.int64, torch.uint8, torch.bool]))
states = st.recursive(leaves | st.none(), lambda t: st.tuples(t, t) | st.lists(t, max_size=3) | st.dictionaries(
    st.text("abc", min_size=1), t, max_size=3), max_leaves=6)


def state(seed: int = 0) -> dict:
    a, b = lf.random.split(lf.random.key(seed))
    return {"params": (lf.random.normal(a, (5, 3)), lf.random.normal(b, (4,), torch.bfloat16)), "step": torch.tensor(7)}


@given(states)
def test_a_snapshot_is_loaded_bit_for_bit(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("run") / "snapshot"
    save_snapshot(value, file)
    assert same(load_snapshot(tree.map(torch.zeros_like, value), file), value)
    assert os.listdir(file.parent) == ["snapshot"]


@given(st.sampled_from(["params.0", "params.1"]), st.data())
def test_a_flipped_bit_in_a_snapshot_is_found(tmp_path_factory, name, data):
    file = tmp_path_factory.mktemp("run") / "snapshot"
    save_snapshot(state(), file)
    content, leaf = bytearray(file.read_bytes()), bits(tree.paths(state())[name])[2]
    place = content.index(leaf) + data.draw(st.integers(0, len(leaf) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: 1 leaves .*\n  {name}: damaged, its checksum"):
        load_snapshot(state(), file)


def test_all_leaves_of_another_run_are_named(tmp_path):
    save_snapshot(state(), tmp_path / "snapshot")
    like = {"params": (torch.zeros(3, 5), torch.zeros(4)), "key": torch.tensor(0)}
    with pytest.raises(ValueError) as error:
        load_snapshot(like, tmp_path / "snapshot")
    assert sorted(line.strip() for line in str(error.value).split("\n")[1:]) == [
        "missing: key", "params.0: should be float32[3, 5], is float32[5, 3]",
        "params.1: should be float32[4], is bfloat16[4]", "unknown: step"]


def test_what_is_no_snapshot_is_an_error(tmp_path, folder):
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: not a snapshot"):
        load_snapshot(state(), folder / "consolidated.00.pth")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_snapshot(state(), tmp_path / "missing")
    save_snapshot(state(), tmp_path / "snapshot")
    os.truncate(tmp_path / "snapshot", 500)
    with pytest.raises(ValueError, match="snapshot: not a file of tensors, or a damaged one"):
        load_snapshot(state(), tmp_path / "snapshot")


def test_a_failed_snapshot_leaves_the_one_before(tmp_path, monkeypatch):
    save_snapshot(state(1), tmp_path / "snapshot")
    monkeypatch.setattr(torch, "save", full_disk(torch.save))
    with pytest.raises(OSError, match="No space left"):
        save_snapshot(state(2), tmp_path / "snapshot")
    assert os.listdir(tmp_path) == ["snapshot"]
    assert same(load_snapshot(state(), tmp_path / "snapshot"), state(1))
