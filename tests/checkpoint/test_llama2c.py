"""llama2.c's files, version 0, against a reader and a writer of their own: `struct`, NumPy, the format's definition.

The definition is `legacy_export` in its export.py and `memory_map_weights` in its run.c; the one of tokenizer.bin is
`export` in its tokenizer.py.
"""

import dataclasses
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import same
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, keys, random_params, token_rows

import llama_fn as lf
from llama_fn.checkpoint.llama2c import open_llama2c, write_llama2c, write_vocabulary
from llama_fn.checkpoint.weights import params_of, weights_of

LAYERS = ["attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"]


def plain(config: lf.Config) -> lf.Config:
    """The config with the constants of run.c."""
    return dataclasses.replace(config, norm_eps=1e-5, rope_theta=1e4)


@st.composite
def models(draw) -> lf.Params:
    """Parameters with separate embedding and output, and with one matrix for both."""
    params = random_params(plain(draw(configs())), draw(keys()), torch.float32)
    return params._replace(output=params.embedding) if draw(st.booleans()) else params


def write(params: lf.Params, folder: Path) -> Path:
    write_llama2c(weights_of(params), folder, None, lambda size: None)
    return folder / "model.bin"


def read(file: Path, dtype: torch.dtype | None = None) -> lf.Params:
    return params_of(open_llama2c(file, dtype).checked(file))


def layout(config: lf.Config, tied: bool) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a file in their order: run.c's names and shapes."""
    layers, d, f, kv = config.n_layers, config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    shapes = {"attention_norm": (d,), "wq": (d, d), "wk": (kv, d), "wv": (kv, d), "wo": (d, d), "ffn_norm": (d,),
              "w1": (f, d), "w2": (d, f), "w3": (f, d)}
    angles = (config.max_seq_len, config.head_dim // 2)
    return [("tok_embeddings", (config.vocab_size, d)), *((name, (layers, *shapes[name])) for name in LAYERS),
            ("norm", (d,)), ("cos", angles), ("sin", angles), *([] if tied else [("output", (config.vocab_size, d))])]


def arrays(data: bytes, config: lf.Config, tied: bool) -> dict[str, np.ndarray]:
    at, found = 28, {}
    for name, shape in layout(config, tied):
        count = math.prod(shape)
        found[name] = np.array(struct.unpack_from(f"<{count}f", data, at), np.float32).reshape(shape)
        at += 4 * count
    assert at == len(data)
    return found


def leaves(params: lf.Params) -> dict[str, np.ndarray]:
    """The tree's leaves by run.c's names."""
    config, blocks = params.config, params.blocks
    parts = {"attention_norm": lambda b: b.attention_norm, "ffn_norm": lambda b: b.ffn_norm,
             "wq": lambda b: b.attention.wq, "wk": lambda b: b.attention.wk, "wv": lambda b: b.attention.wv,
             "wo": lambda b: b.attention.wo, "w1": lambda b: b.feed_forward.w_gate,
             "w2": lambda b: b.feed_forward.w_down, "w3": lambda b: b.feed_forward.w_up}
    shapes = dict(layout(config, tied=False))
    found = {name: np.stack([part(block).numpy() for block in blocks]).reshape(shapes[name])
             for name, part in parts.items()}
    return {"tok_embeddings": params.embedding.numpy(), "norm": params.norm.numpy(), "output": params.output.numpy(),
            **found}


@given(models())
def test_the_file_holds_what_the_format_says(tmp_path_factory, params):
    config, tied = params.config, params.output is params.embedding
    data = write(params, tmp_path_factory.mktemp("c")).read_bytes()
    assert struct.unpack("<7i", data[:28]) == (
        config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads,
        config.vocab_size if tied else -config.vocab_size, config.max_seq_len)
    found, expected = arrays(data, config, tied), leaves(params)
    for name in found.keys() - {"cos", "sin"}:
        assert np.array_equal(found[name], expected[name]), name
    h = config.head_dim
    angles = np.arange(config.max_seq_len)[:, None] * 10000.0 ** -(np.arange(0, h, 2) / h)
    assert np.abs(found["cos"] - np.cos(angles)).max() < 1e-4 and np.abs(found["sin"] - np.sin(angles)).max() < 1e-4


@given(configs(), keys(), st.booleans())
def test_a_file_by_the_format_is_read(tmp_path_factory, config, key, tied):
    config, file = plain(config), tmp_path_factory.mktemp("c") / "stories15M.bin"
    numbers = {name: lf.random.normal(lf.random.fold_in(key, i), shape).numpy()
               for i, (name, shape) in enumerate(layout(config, tied))}
    sizes = (config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads,
             config.vocab_size if tied else -config.vocab_size, config.max_seq_len)
    file.write_bytes(struct.pack("<7i", *sizes) + b"".join(x.astype("<f4").tobytes() for x in numbers.values()))
    params = read(file)
    assert params.config == config and (params.output is params.embedding) == tied
    found = leaves(params)
    assert all(np.array_equal(found[name], x) for name, x in numbers.items() if name not in ("cos", "sin"))


@given(models())
def test_a_tree_and_a_file_come_back_bit_for_bit(tmp_path_factory, params):
    first, second = (tmp_path_factory.mktemp("c") for _ in range(2))
    again = read(write(params, first))
    assert same(again, params)
    assert (again.output is again.embedding) == (params.output is params.embedding)
    assert write(again, second).read_bytes() == (first / "model.bin").read_bytes()
    assert same(read(first / "model.bin", torch.float64), lf.tree.map(torch.Tensor.double, params))
    tokens = token_rows(params.config, 3, 20)
    assert torch.equal(lf.forward(again, tokens)[0], lf.forward(params, tokens)[0])


@given(models(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_weights_of_half_the_precision_are_written_in_float32(tmp_path_factory, params, dtype):
    half = lf.tree.map(lambda x: x.to(dtype), params)
    assert same(read(write(half, tmp_path_factory.mktemp("c"))), lf.tree.map(torch.Tensor.float, half))


def test_no_write_to_the_weights_reaches_the_file(model, tmp_path):
    lf.save(model, tmp_path, format="llama2c")
    before = (tmp_path / "model.bin").read_bytes()
    params = lf.load(tmp_path).params
    for x in lf.tree.leaves(params):
        x.zero_()
    assert (tmp_path / "model.bin").read_bytes() == before
    assert same(lf.load(tmp_path).params, model.params)


def test_a_model_is_loaded_by_its_folder_or_by_its_file(model, tmp_path):
    lf.save(model, tmp_path / "c", format="llama2c")
    assert sorted(os.listdir(tmp_path / "c")) == ["model.bin", "tokenizer.bin", "tokenizer.model"]
    (tmp_path / "c" / "model.bin").rename(tmp_path / "c" / "stories.bin")
    for again in (lf.load(tmp_path / "c" / "stories.bin"), lf.load(str(tmp_path / "c" / "stories.bin"))):
        assert same(again.params, model.params) and again.tokenizer == model.tokenizer
    (tmp_path / "c" / "stories.bin").rename(tmp_path / "c" / "model.bin")
    assert same(lf.load(tmp_path / "c").params, model.params)


def test_the_vocabulary_is_every_tokens_score_and_text(tokenizer, tmp_path):
    write_vocabulary(tokenizer, tokenizer.vocab_size, tmp_path / "tokenizer.bin")
    data, at, tokens = (tmp_path / "tokenizer.bin").read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        tokens.append((score, data[at + 8:at + 8 + length].decode()))
        at += 8 + length
    assert at == len(data) and len(tokens) == tokenizer.vocab_size
    assert struct.unpack_from("<i", data) == (max(len(text.encode()) for _, text in tokens),)
    assert [text for _, text in tokens[:5]] == ["<unk>", "\n<s>\n", "\n</s>\n", "<0x00>", "<0x01>"]
    words = [text for _, text in tokens[259:]]
    assert [tokenizer.decode([i], continued=True) for i in range(259, tokenizer.vocab_size)] == words
    assert " the" in words and "\u2581" not in "".join(words)
    assert [score for score, _ in tokens] == [tokenizer.processor.get_score(i) for i in range(len(tokens))]


# --- what is refused


@pytest.mark.parametrize("changes, message", [
    ({"norm_eps": 1e-6}, r"run\.c computes with norm_eps 1e-05 and rope_theta 10000, this model with 1e-06 and 10000"),
    ({"rope_theta": 5e5}, r"this model with 1e-05 and 500000\.0$"),
    ({"rope_scaling": lf.RopeScaling("linear", 2.0)}, r"and RopeScaling\(kind='linear', factor=2\.0"),
])
def test_what_run_c_computes_otherwise_is_not_written(model, tmp_path, changes, message):
    params = model.params._replace(config=dataclasses.replace(model.params.config, **changes))
    with pytest.raises(ValueError, match=message):
        lf.save(lf.Model(params, model.tokenizer), tmp_path / "c", format="llama2c")
    assert os.listdir(tmp_path) == []


def test_shards_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"llama2\.c's checkpoint is one file, 2 shards cannot be made"):
        lf.save(model, tmp_path / "c", format="llama2c", shards=2)
    assert os.listdir(tmp_path) == []
    lf.save(model, tmp_path / "c", format="llama2c", shards=1)
    assert same(lf.load(tmp_path / "c").params, model.params)


@pytest.mark.parametrize("damage, message", [
    (lambda data: data[:-4], "its header implies [0-9]+ bytes, and it has [0-9]+: damaged, or another version than 0"),
    (lambda data: data + bytes(4), "its header implies"),
    (lambda data: data[:20], "20 bytes are no checkpoint of llama2.c, whose header has 28"),
    (lambda data: b"", "0 bytes are no checkpoint"),
    (lambda data: bytes(len(data)), "not a checkpoint of llama2.c .version 0.: Config: dim must be an integer of at l"),
    (lambda data: np.random.default_rng(0).bytes(len(data)), "not a checkpoint of llama2.c|its header implies"),
    (lambda data: struct.pack("<Ii", 0x616b3432, 1) + data, "not a checkpoint of llama2.c|its header implies"),
    *((lambda data, at=at: data[:at] + struct.pack("<i", -1) + data[at + 4:], "must be an integer of at least 1, got -")
      for at in (0, 4, 8, 12, 16, 24)),
])
def test_a_file_that_is_not_what_its_header_tells_is_refused(model, tmp_path, damage, message):
    lf.save(model, tmp_path, format="llama2c")
    file = tmp_path / "model.bin"
    file.write_bytes(damage(file.read_bytes()))
    for place in (tmp_path, file):
        with pytest.raises(ValueError, match=message) as error:
            lf.load(place)
        assert str(file) in str(error.value)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_bin_file_of_pytorch_is_refused(model, tmp_path, old_format):
    lf.save(model._replace(params=lf.tree.map(torch.Tensor.float, model.params)), tmp_path, format="hf")
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    torch.save(lf.to_hf(model.params), file, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match="PyTorch") as error:
        lf.load(file)
    assert str(error.value) == (f"{file}: a file of PyTorch's, and no checkpoint of llama2.c's; give the folder that "
                                f"holds it and config.json: {tmp_path}")
    if not old_format:
        assert same(lf.load(tmp_path).params, model.params)
