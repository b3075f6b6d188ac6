"""Where nothing can be compiled, everything gives the same results uncompiled, and one warning says what to do."""

import os

import pytest
import torch
from strategies import random_params, token_rows

import llama_fn as lf
from llama_fn.compiled import compiler, decoding
from llama_fn.generation import decode

CONFIG = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)
FOLDER = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(params=["a file is in the way", "no folder can be made", "no temporary folder", "a disk without room",
                        "no compiler", "a compiler that fails", "a compiler that makes nothing"])
def broken(request, monkeypatch, tmp_path) -> str:
    """Something that is in the way of a compilation; what its warning must name. (Root may write to any folder.)"""
    plain = tmp_path / "file"
    plain.write_text("")
    if request.param == "no temporary folder":
        monkeypatch.delenv(FOLDER, raising=False)
        monkeypatch.setattr(compiler.tempfile, "tempdir", str(plain / "below"))
        return f"{plain}/below.*{FOLDER}"
    if request.param == "a disk without room":
        monkeypatch.setenv(FOLDER, str(tmp_path))
        monkeypatch.setattr(compiler.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**23}))
        return f"{tmp_path}, has less than 16 MiB.*{FOLDER}"
    if "compiler" in request.param:
        name = {"no compiler": "no-such-compiler", "a compiler that fails": "false"}.get(request.param, "true")
        monkeypatch.setenv("CXX", name)
        return f"C.. compiler '{name}'.*CXX"
    folder = plain / "below" if request.param == "a file is in the way" else "/proc/none/below"
    monkeypatch.setenv(FOLDER, str(folder))
    return f"{folder}.*{FOLDER}"


def test_everything_runs_uncompiled_and_one_warning_names_what_is_in_the_way(broken, monkeypatch):
    params, tokens = random_params(CONFIG, lf.random.key(0), torch.float32), token_rows(CONFIG, 2, 5)
    expected, _ = lf.forward(params, tokens)
    for make, name in ((lf.jit, "forward"), (lambda f: lf.jit_layers(f), "forward")):
        with pytest.warns(UserWarning, match=f"(?s){broken}.*{name} runs as it is") as told:
            step = make(lf.forward)
        assert len(told) == 1
        assert torch.equal(step(params, tokens)[0], expected)
    monkeypatch.setattr(decode, "_compiled", decoding.decoder(decode._forward_and_draw, decode.drawn))
    monkeypatch.setattr(decoding, "LARGE", 0)
    model = lf.load("stories")
    with pytest.warns(UserWarning, match=f"(?s){broken}") as told:
        lf.text_completion(model, ["Once"], key=lf.random.key(0), max_new_tokens=3)
    assert len(told) == 1


def test_a_compiler_that_ctrl_c_ended_is_no_obstacle(tmp_path, monkeypatch):
    compiler_file = tmp_path / "interrupted"
    compiler_file.write_text("#!/bin/sh\nkill -INT $$\n")
    compiler_file.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler_file))
    with pytest.raises(KeyboardInterrupt):
        compiler.obstacle()


def test_where_there_is_nothing_in_the_way_something_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "new" / "folder"))
    assert compiler.obstacle() is None
    assert not os.listdir(tmp_path / "new" / "folder")  # the trial leaves nothing


@pytest.mark.slow
def test_inductor_keeps_its_code_in_the_folder_that_is_tried(monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # a second

    for changed in ({FOLDER: "/tmp/../tmp/llama_fn_folder"}, {"HOME": ""}, {"USER": "a/b", "LOGNAME": "a/b"}, {}):
        with monkeypatch.context() as patch:
            patch.delenv(FOLDER, raising=False)
            patch.setattr(os, "makedirs", lambda *_, **__: None)
            for name, value in changed.items():
                patch.setenv(name, value)
            ours = compiler._folder()
            assert cache_dir() == ours  # it sets the variable, too
