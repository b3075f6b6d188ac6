"""Quantized weights come back from files bit for bit, or are refused by an error that names them."""

import weakref

import pytest
import torch
from folders import bits as bits_of
from folders import contents, edit_weights, read_meta, same, write_meta
from hypothesis import assume, given
from hypothesis import strategies as st
from program import cli
from strategies import configs, keys, token_rows

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint import convert as converting
from llama_fn.checkpoint.weights import DTYPES

FILE = "consolidated.00.pth"


@pytest.fixture(params=["int8", "int4"])
def bits(request) -> str:
    return request.param


@pytest.fixture
def small(model, bits) -> lf.Model:
    return model._replace(params=lf.quantize(model.params, bits))


@pytest.fixture
def folder(small, tmp_path):
    lf.save(small, tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: cli(monkeypatch, capsys, *map(str, args))


def parts(params: lf.Params, integers: bool) -> list:
    """The leaves of quantized matrices, or all the others."""
    return [bits_of(x) for path, x in tree.paths(params).items() if path.endswith((".values", ".scale")) is integers]


@given(keys(), configs(), st.sampled_from(DTYPES), st.sampled_from(["int8", "int4"]))
def test_what_was_saved_quantized_is_loaded_bit_for_bit(tmp_path_factory, key, config, dtype, bits):
    assume(bits == "int8" or config.hidden_dim % 2 == 0)
    params, folder = lf.quantize(lf.init_params(key, config, dtype), bits), tmp_path_factory.mktemp("model")
    write_meta(params, folder)
    again = read_meta(folder)
    assert same(again.blocks, params.blocks) and same(again._replace(config=config), params)
    tokens = token_rows(config, 5)
    assert torch.equal(lf.forward(again, tokens)[0], lf.forward(params, tokens)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_is_that_of_the_embedding_and_the_norms(small, folder, tmp_path, dtype):
    lf.save(small, tmp_path / "cast", dtype=dtype)
    for params in (lf.load(folder, dtype=dtype).params, lf.load(tmp_path / "cast").params):
        assert parts(params, integers=True) == parts(small.params, integers=True)
        plain = small.params._replace(embedding=small.params.embedding.to(dtype), norm=small.params.norm.to(dtype))
        assert params.embedding.dtype == params.blocks[1].ffn_norm.dtype == dtype
        assert torch.equal(params.embedding, plain.embedding) and torch.equal(params.norm, plain.norm)


def test_the_file_is_as_small_as_the_weights(small, folder, model, bits):
    kept = sum(x.nbytes for x in tree.leaves(small.params))
    assert kept < (folder / FILE).stat().st_size < kept + 40_000
    assert set(torch.load(folder / FILE)) == {
        "tok_embeddings.weight", "norm.weight", *(f"output.weight{end}" for end in ("", ".scale")),
        *(f"layers.{i}.{name}.weight" for i in range(4) for name in ("attention_norm", "ffn_norm")),
        *(f"layers.{i}.{name}.weight{end}" for i in range(4) for end in ("", ".scale")
          for name in (*(f"attention.w{x}" for x in "qkvo"), *(f"feed_forward.w{x}" for x in "123")))}


@pytest.mark.parametrize(("args", "where"), [
    ({"format": "hf"}, "the format hf"), ({"format": "llama2c"}, "llama2.c's checkpoint"), ({"shards": 2}, "2 shards")])
def test_other_layouts_have_no_place_for_them(small, bits, tmp_path, args, where):
    message = rf"cannot hold quantized weights \({bits}\): write them in the format meta, in one file, or .*dequantize"
    with pytest.raises(ValueError, match=f"{where} {message}"):
        lf.save(small, tmp_path / "new", **args)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"the state of a LlamaForCausalLM {message}"):
        lf.to_hf(small.params)
    adapter = lf.lora.init(lf.random.key(0), small.params, 2)
    with pytest.raises(ValueError, match=r"wq is not a plain tensor, .*; merge an adapter first"):
        lf.save(small._replace(params=lf.lora.apply(small.params, adapter)), tmp_path / "new")


def test_what_is_quantized_is_not_quantized_again(folder, bits, run):
    message = f"small: its weights are quantized already, to {bits}; leave quantize out, or quantize the model that"
    with pytest.raises(ValueError, match=message):
        lf.load(folder, quantize="int8")
    status, _, err = run("convert", "small", "new", "--to", "meta", "--quantize", "int8")
    assert status == 2 and message in err and len(err.splitlines()) == 1 and not (folder.parent / "new").exists()


def test_all_that_does_not_fit_is_named_in_one_error(folder, bits):
    kind, half, scale, ends = {"int8": ("int8", 48, "float32", ""), "int4": ("uint8", 24, "bfloat16", ", 1, 2")}[bits]
    state = torch.load(folder / FILE)
    del state["layers.0.attention.wq.weight.scale"], state["layers.1.attention.wq.weight"]
    state["layers.0.attention.wk.weight"] = state["layers.0.attention.wk.weight"][:, :10]
    state["layers.0.attention.wv.weight"] = state["layers.0.attention.wv.weight"].to(torch.int32)
    state["layers.2.attention.wv.weight.scale"] = state["layers.2.attention.wv.weight.scale"][:3]
    state["output.weight.scale"] = state["output.weight.scale"].half()
    state["tok_embeddings.weight"] = state["tok_embeddings.weight"].to(torch.int8)
    torch.save(state, folder / FILE)
    with pytest.raises(ValueError) as error:
        lf.load(folder)
    assert sorted(error.value.args[0].split("\n  ")[1:]) == sorted([
        f"missing: layers.0.attention.wq.weight.scale in {FILE}",
        f"missing: layers.1.attention.wq.weight in {FILE}",
        f"layers.0.attention.wk.weight in {FILE}: should be {kind}[16, {half}], is {kind}[16, 10]",
        f"layers.0.attention.wv.weight in {FILE}: should be [16, 48], is int32",
        f"unknown: layers.0.attention.wv.weight.scale in {FILE}",
        f"unknown: layers.1.attention.wq.weight.scale in {FILE}",
        f"layers.2.attention.wv.weight.scale in {FILE}: should be {scale}[16{ends}], is {scale}[3{ends}]",
        f"output.weight.scale in {FILE}: should be {scale}[401{ends}], is float16[401{ends}]",
        f"tok_embeddings.weight in {FILE}: should be [401, 48], is int8"])


def test_quantized_matrices_may_lie_among_tensors(model, small, folder):
    mixed = model.params._replace(output=small.params.output)
    lf.save(model._replace(params=mixed), folder)
    assert same(lf.load(folder).params, mixed)


def test_inspect_tells_of_quantized_weights(run, folder, bits, small):
    status, out, _ = run("inspect", "small")
    kept = sum(x.nbytes for x in tree.leaves(small.params))
    assert status == 0 and f"{'quantized':<16}{bits}, all matrices but the embedding\n" in out
    assert f"{'tensors':<16}68, {kept:,} bytes, " in out and f"{small.params.config.n_params:,}" in out
    edit_weights(folder / FILE, wq=lambda x: x[:-1])
    status, out, _ = run("inspect", "small")
    assert status == 1 and "wrong: layers.0.attention.wq.weight in" in out


def test_convert_quantizes_a_matrix_at_a_time(run, monkeypatch, model, small, folder, bits, tmp_path):
    lf.save(model, tmp_path / "model", format="hf")
    opened, alive, most = converting.open_weights, weakref.WeakSet(), 0

    def watched(*args):
        weights = opened(*args)

        def read(path: str) -> torch.Tensor:
            nonlocal most
            x = weights.read(path)
            if path.startswith("blocks") and "norm" not in path:
                alive.add(x)
                most = max(most, len(alive))
            return x

        return weights._replace(read=read)

    monkeypatch.setattr(converting, "open_weights", watched)
    status, _, err = run("convert", "model", "new", "--to", "meta", "--quantize", bits)
    assert status == 0 and "39 of 39 tensors: 100%" in err and 1 <= most <= 2  # the one before, and the next
    assert contents(tmp_path / "new") == contents(folder)
    status, _, err = run("convert", "model", "other", "--to", "hf", "--quantize", bits)
    assert status == 2 and f"the format hf cannot hold quantized weights ({bits})" in err
    assert not (tmp_path / "other").exists()


def test_convert_merges_an_adapter_before_it_quantizes(run, model, bits, tmp_path):
    adapter = tree.map(lambda x: x + 0.1, lf.lora.init(lf.random.key(0), model.params, 2))
    lf.save(model, tmp_path / "model")
    lf.lora.save(adapter, tmp_path / "adapter", model.params)
    assert run("convert", "model", "new", "--to", "meta", "--adapter", "adapter", "--quantize", bits)[0] == 0
    assert same(lf.load("new").params, lf.quantize(lf.lora.merge(model.params, adapter), bits))
    status, _, err = run("convert", "new", "other", "--to", "meta", "--adapter", "adapter")
    assert status == 2 and f"a weight with the adapter adapter in it cannot hold quantized weights ({bits})" in err
