"""`convert`: the same model in another format, written whole or not at all."""

import errno
import json
import os

import pytest
import torch
from program import cli

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint import convert as converting

FORMATS = ["meta", "hf", "llama2c"]


def same(a: lf.Params, b: lf.Params) -> bool:
    return a.config == b.config and all(
        torch.equal(*pair) for pair in zip(tree.leaves(a), tree.leaves(b), strict=True))


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The model's folder in each format."""
    root = tmp_path_factory.mktemp("models")
    for format in FORMATS:
        lf.save(model, root / format, format=format)
    return root


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: cli(monkeypatch, capsys, *map(str, args))


def edit(file: str, **changes) -> None:
    with open(file) as old:
        settings = json.load(old) | changes
    with open(file, "w") as new:
        json.dump(settings, new)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("src", FORMATS)
def test_convert_writes_the_same_model_in_another_format(run, saved, model, tmp_path, src, to):
    status, out, err = run("convert", saved / src, "out", "--to", to)
    assert (status, out) == (0, "") and list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert same(lf.load("out").params, model.params) and lf.load("out").tokenizer == model.tokenizer
    assert files(tmp_path / "out").keys() == files(saved / to).keys()
    assert len({path.stat().st_mode for path in tmp_path.glob("out/*")}) == 1  # who may read one may read all
    assert "39 of 39 tensors: 100%" in err and "B/s]" in err
    assert err.endswith(f"\nout: {model.params.config.n_params:,} parameters, {to}\n")


def test_convert_takes_the_embedded_model_and_the_file_of_llama2c(run, saved, model):
    assert run("convert", "stories", "out", "--to", "hf")[0] == 0
    assert same(lf.load("out").params, lf.load("stories").params)
    assert run("convert", saved / "llama2c" / "model.bin", "other", "--to", "meta")[0] == 0
    assert same(lf.load("other").params, model.params)


def test_convert_makes_shards_and_casts(run, saved, texts, model, tmp_path):
    tokenizer = lf.train_tokenizer(texts, 402)
    config = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=402, hidden_dim=70)
    params = lf.init_params(lf.random.key(1), config)
    lf.save(lf.Model(params, tokenizer), "even")
    assert run("convert", "even", "two", "--to", "meta", "--shards", 2)[0] == 0
    assert run("convert", "two", "three", "--to", "hf", "--shards", 3, "--dtype", "bfloat16")[0] == 0
    assert len(list(tmp_path.glob("two/*.pth"))) == 2 and len(list(tmp_path.glob("three/*.safetensors"))) == 3
    assert same(lf.load("two").params, params)
    assert same(lf.load("three").params, tree.map(lambda x: x.bfloat16(), params))
    status, _, err = run("convert", saved / "meta", "out", "--to", "meta", "--shards", 2)
    assert status == 2 and err.splitlines()[-1] == "llama-fn: 2 shards cannot be made: vocab_size is 401"
    assert not (tmp_path / "out").exists()


def test_convert_writes_over_a_model_only_if_told(run, saved, model, tmp_path):
    run("convert", saved / "meta", "out", "--to", "hf", "--shards", 3)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = files(tmp_path)
    status, out, err = run("convert", "stories", "out", "--to", "hf")
    assert (status, out) == (2, "") and files(tmp_path) == before
    assert err == ("llama-fn: out exists and is not empty; choose another folder, or replace the model with --force\n")
    status, _, err = run("convert", "stories", "out", "--to", "meta", "--force")
    assert status == 2 and "out: a model in another format lies there (config.json)" in err
    assert files(tmp_path) == before
    assert run("convert", "stories", "out", "--to", "hf", "--force")[0] == 0
    assert same(lf.load("out").params, lf.load("stories").params)
    assert files(tmp_path / "out").keys() == (files(saved / "hf").keys() | {"notes.txt"})  # and no shard


def test_convert_writes_into_an_empty_folder_and_beside_its_source(run, saved, model, tmp_path):
    (tmp_path / "out").mkdir()
    assert run("convert", saved / "hf", "out", "--to", "meta")[0] == 0
    lf.save(model, "parent/child")
    assert run("convert", "parent/child", "parent", "--to", "hf", "--force")[0] == 0
    assert same(lf.load("parent").params, model.params) and same(lf.load("parent/child").params, model.params)


@pytest.mark.parametrize("src", ["meta", "./meta/../meta", "llama2c", "llama2c/model.bin"])
def test_convert_refuses_its_own_source(run, saved, src):
    folder, before = saved / src.split("/")[0 if src[0] != "." else 1], files(saved)
    status, _, err = run("convert", f"{saved}/{src}", folder, "--to", "meta", "--force", "--dtype", "float16")
    assert status == 2 and err.endswith("are the same folder; choose another DST\n") and err.count("\n") == 1
    assert files(saved) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space"), 2)])
def test_convert_that_ends_early_leaves_nothing(run, monkeypatch, saved, tmp_path, to, force, raised, status):
    if force:
        run("convert", "stories", "out", "--to", to)
    before, opened = files(tmp_path), converting.open_weights

    def failing(*args):
        weights = opened(*args)
        some = iter(range(9))

        def read(path):
            if next(some, None) is None:
                raise raised
            return weights.read(path)

        return weights._replace(read=read)

    monkeypatch.setattr(converting, "open_weights", failing)
    found, out, err = run("convert", saved / "meta", "out", "--to", to, *["--force"] * force)
    assert (found, out) == (status, "") and "Traceback" not in err
    assert files(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["out"] * force


@pytest.mark.parametrize(("args", "message"), [
    (["nowhere", "out", "--to", "hf"], "nowhere: no model there: expected the name of an embedded model (stories, "),
    (["stories", "file", "--to", "hf"], "file is a file; choose a folder"),
    (["stories", "out", "--to", "llama2c", "--shards", "2"], "llama2.c's checkpoint is one file, 2 shards cannot be"),
    (["stories", "out", "--to", "hf", "--shards", "99"], "99 files cannot be made of 39 weights"),
    (["stories", "out", "--to", "meta", "--shards", "0"], "0 shards cannot be made: their number must be at least 1"),
])
def test_convert_refuses_bad_input_in_one_line(run, tmp_path, args, message):
    (tmp_path / "file").touch()
    status, out, err = run("convert", *args)
    assert (status, out) == (2, "") and err.startswith(f"llama-fn: {message}") and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.filterwarnings("default")
def test_convert_warns_of_what_it_leaves_out(run, model):
    lf.save(model, "odd")
    edit("odd/params.json", mystery=1)
    status, _, err = run("convert", "odd", "out", "--to", "hf")
    assert status == 0
    assert "llama-fn: odd/params.json: unknown settings, left out of account: mystery\n" in err
