import os
from pathlib import Path

import pytest
import torch
from folders import contents, failing, full_disk, same

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint import files, llama2c
from llama_fn.checkpoint.load import MARKERS


@pytest.fixture
def folder(model, tmp_path) -> Path:
    lf.save(model, tmp_path / "model")
    return tmp_path / "model"


def other(model: lf.Model) -> lf.Model:
    return lf.Model(tree.map(lambda x: x + 1, model.params), model.tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_model_saved_in_another_dtype_is_the_cast_one(model, tmp_path, dtype):
    lf.save(model, tmp_path, dtype=dtype)
    assert same(lf.load(tmp_path).params, tree.map(lambda x: x.to(dtype), model.params))


def test_an_unknown_format_is_an_error_and_writes_nothing(model, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'gguf'"):
        lf.save(model, tmp_path / "new", format="gguf")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()], ids=["full", "interrupted"])
@pytest.mark.parametrize("format, owner, write", [
    ("meta", torch, "save"), ("meta", Path, "write_text"), ("meta", Path, "write_bytes"),
    ("hf", files, "save_file"), ("hf", Path, "write_text"),
    ("llama2c", llama2c, "write_llama2c"), ("llama2c", llama2c, "write_vocabulary"),
])
def test_a_failed_write_leaves_the_old_files_whole_and_no_part(model, tmp_path, monkeypatch, format, owner, write,
                                                               error):
    lf.save(model, tmp_path / "old", format=format)
    before = contents(tmp_path)
    monkeypatch.setattr(owner, write, failing(getattr(owner, write), error))
    for name in ("old", "new"):
        with pytest.raises(type(error)):
            lf.save(other(model), tmp_path / name, format=format)
        assert contents(tmp_path) == before
    monkeypatch.undo()
    assert same(lf.load(tmp_path / "old").params, model.params)
    lf.save(other(model), tmp_path / "old", format=format)
    assert same(lf.load(tmp_path / "old").params, other(model).params)


def test_saving_over_a_model_leaves_none_of_its_files_and_all_others(model, folder):
    (folder / "consolidated.01.pth").write_bytes(b"a shard of the model before")
    others = {"README.md": b"mine", "consolidated.backup.pth": b"mine", "model.gguf": b"mine"}
    for name, content in others.items():
        (folder / name).write_bytes(content)
    lf.save(other(model), folder)
    lf.save(other(model), folder.parent / "new")
    assert contents(folder) == contents(folder.parent / "new") | others


def test_a_model_is_written_within_its_folder(model, folder, monkeypatch):
    """The user may have no permission to write outside the folder, or the folder may be a mount point."""
    seen, save = [], torch.save

    def watched(*args) -> None:
        save(*args)
        seen.append(sorted(os.listdir(folder.parent)))

    monkeypatch.setattr(torch, "save", watched)
    lf.save(other(model), folder)
    assert seen == [["model"]]


def test_a_folder_in_the_place_of_a_file_stops_the_writing(model, folder):
    (folder / "params.json").unlink()
    (folder / "params.json").mkdir()
    before = contents(folder)
    with pytest.raises(OSError, match=r"Is a directory, while writing; choose another name.*params\.json"):
        lf.save(other(model), folder)
    assert contents(folder) == before


@pytest.mark.parametrize("there", ["meta", "hf", "llama2c"])
@pytest.mark.parametrize("format", ["meta", "hf", "llama2c"])
def test_a_folder_holds_one_format(model, tmp_path, there, format):
    lf.save(model, tmp_path / "a", format=there)
    before = contents(tmp_path / "a")
    if format == there:
        lf.save(other(model), tmp_path / "a", format=format)
        assert same(lf.load(tmp_path / "a").params, other(model).params)
        return
    with pytest.raises(ValueError, match=f"a model in another format lies there .{MARKERS[there]}.; choose a folder"):
        lf.save(model, tmp_path / "a", format=format)
    assert contents(tmp_path / "a") == before
    lf.save(model, tmp_path / "b", format=format)
    for name, content in before.items():
        (tmp_path / "b" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"in the formats .*, by .*{MARKERS[there]}.*; put each in a folder of its"):
        lf.load(tmp_path / "b")


def test_a_model_may_be_saved_over_the_one_that_it_was_loaded_from(model, folder):
    """The weights are mapped from that file, and are nowhere else."""
    again = lf.load(folder)
    lf.save(other(again), folder)
    lf.save(again, folder)
    assert same(again.params, model.params) and same(lf.load(folder).params, model.params)


def test_parameters_that_do_not_fit_their_config_are_not_written(model, tmp_path):
    layers = model.params.blocks
    for blocks, message in [(layers[:-1], r"blocks\.3\.attention_norm: should be \[48\], is None"),
                            (layers * 2, r"blocks\.7\.attention_norm: should be None, is \[48\]"),
                            ((layers[0]._replace(ffn_norm=torch.ones(5)), *layers[1:]),
                             r"blocks\.0\.ffn_norm: should be \[48\], is \[5\]")]:
        with pytest.raises(ValueError, match=rf"the parameters do not fit their config:\n(.*\n)*  {message}"):
            lf.save(lf.Model(model.params._replace(blocks=blocks), model.tokenizer), tmp_path / "new")
    assert not list(tmp_path.iterdir())
