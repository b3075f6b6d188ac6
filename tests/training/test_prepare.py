"""The files that a run learns from: what is held out, and a preparation that is killed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from writers import calls

import llama_fn as lf
from llama_fn.training import loop, prepare
from llama_fn.training.plan import Plan
from llama_fn.training.prepare import held_out, sources_of_files
from llama_fn.training.run import run
from llama_fn.training.shard import open_shard
from llama_fn.training.texts import Dialog, Document, Prompt, documents

SMALL = Plan(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=20, context=24, steps=1, batch=2)
LINES = [f"the cat number {i} sat on the mat.\n" for i in range(60)]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(loop, "jit", lambda f, donate: f)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prepare")


def split(file: Path) -> tuple[list[Document], list[Document]]:
    sources = sources_of_files([file])
    return list(sources.train()), list(sources.valid())


def write(file: Path, records: list) -> Path:
    file.write_text("".join(json.dumps({"text": x} if isinstance(x, str) else x) + "\n" for x in records))
    return file


# --- what is held out

@given(st.permutations(LINES), st.lists(st.text("abc", min_size=1, max_size=5), max_size=9))
def test_neither_order_nor_other_documents_change_what_is_held_out(folder, order, more):
    train, valid = split(write(folder / "a.jsonl", LINES))
    assert 0 < len(valid) < len(LINES) / 6 and sorted(train + valid) == sorted(LINES)
    other, others = split(write(folder / "b.jsonl", [*more, *order]))
    assert {*train} <= {*other} and {*valid} <= {*others}
    assert other == [x for x in [*more, *order] if x not in others]  # in their order


def test_one_document_in_20_is_held_out_and_equal_ones_together():
    found = [held_out(f"document {i}") for i in range(20_000)]
    assert abs(sum(found) - 1000) < 150
    assert held_out(Prompt("a", "b")) == held_out(Prompt("a", "b"))


@given(st.lists(st.text("ab \n", min_size=2, max_size=40).filter(str.strip), min_size=1, max_size=19, unique=True))
def test_of_few_texts_the_end_of_each_is_held_out(folder, texts):
    train, valid = split(write(folder / "c.jsonl", texts))
    assert [a + b for a, b in zip(train, valid, strict=True)] == texts
    assert all(len(a) >= len(b) for a, b in zip(train, valid, strict=True))


def test_of_few_dialogs_one_is_held_out_and_one_alone_is_an_error(folder):
    records = [{"prompt": f"{i}", "completion": "."} for i in range(5)]
    train, valid = split(write(folder / "d.jsonl", records))
    assert len(train) == 4 and len(valid) == 1 and {*train, *valid} == {Prompt(f"{i}", ".") for i in range(5)}
    assert split(write(folder / "e.jsonl", records[::-1]))[1] == valid
    with pytest.raises(ValueError, match="there is only one prompt or dialog: give two at least"):
        split(write(folder / "f.jsonl", records[:1]))


def test_texts_of_which_none_is_held_out_by_its_digest_are_cut(folder):
    texts = [text for text in (f"a document of {i} words" for i in range(99)) if not held_out(text)][:30]
    train, valid = split(write(folder / "g.jsonl", texts))
    assert len(train) == len(valid) == 30


# --- preparing

def test_progress_counts_every_character_of_every_file(tmp_path):
    said = []
    file = write(tmp_path / "a.jsonl", LINES)
    prepare.prepare(tmp_path / "run", 300, sources_of_files([file]), report=lambda *what: said.append(what))
    train, valid = split(file)
    assert said[0] == ("tokenizer.model", 0)
    for name, texts in (("data/train.bin", train), ("data/valid.bin", valid)):
        assert sum(count for where, count in said if where == name) == sum(map(len, texts))


def test_dialogs_are_prepared_with_what_is_learned_of_them(tmp_path):
    dialogs = [{"messages": [{"role": "user", "content": line}, {"role": "assistant", "content": "Yes."}]}
               for line in LINES]
    file = write(tmp_path / "a.jsonl", dialogs)
    tokenizer = prepare.prepare(tmp_path / "run", 300, sources_of_files([file]), lf.dialog_tokens)
    shard = open_shard(tmp_path / "run" / "data" / "valid.bin", tokenizer)
    held = [document for document in documents(file) if held_out(document)]
    assert held and isinstance(held[0], Dialog) and len(shard.ends) == len(held)
    first = lf.dialog_tokens(tokenizer, held[0].messages)
    count = len(first.tokens)
    assert shard.tokens[:count].tolist() == first.tokens.tolist()
    assert shard.learned[:count].astype(bool).tolist() == first.mask.tolist()


def killed(folder: Path, texts: Path, at: int) -> bool:
    """Whether a run in a process of its own was killed before its call number `at` that changes the folder.

    The process ends by itself where training begins.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    count = 0

    def before(name: str, args: tuple) -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with pytest.MonkeyPatch.context() as patch, calls(patch, before):
            patch.setattr("llama_fn.training.run.train", lambda *args: os._exit(0))
            run(folder, SMALL, texts)
    finally:
        os._exit(0)


def test_killed_anywhere_while_it_prepares_a_folder_is_started_and_resumed(tmp_path):
    texts = write(tmp_path / "a.jsonl", LINES)
    run(tmp_path / "whole", SMALL, texts)
    expected = {name: (tmp_path / "whole" / name).read_bytes() for name in prepare.FILES}
    at = 0
    while killed(tmp_path / f"run{(at := at + 1)}", texts, at):
        folder = tmp_path / f"run{at}"
        if (folder / "run.json").is_file() or (folder.is_dir() and not any(folder.iterdir())) or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            continue  # a run, or nothing at all
        run(folder, SMALL, texts, resume=at % 2 == 0)
        assert {name: (folder / name).read_bytes() for name in prepare.FILES} == expected
        assert not [file for file in folder.rglob(".*")]
        shutil.rmtree(folder)
    assert at > 10


def test_what_a_killed_preparation_left_of_other_texts_is_made_again(tmp_path):
    other, texts = write(tmp_path / "a.jsonl", [line.upper() for line in LINES]), write(tmp_path / "b.jsonl", LINES)
    prepare.prepare(tmp_path / "run", 300, sources_of_files([other]))
    run(tmp_path / "run", SMALL, texts)
    run(tmp_path / "whole", SMALL, texts)
    for name in prepare.FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_file_of_a_user_is_never_removed(tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "train.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not empty and holds no training run"):
        run(tmp_path / "run", SMALL, write(tmp_path / "a.jsonl", LINES))
    prepare.clear(tmp_path / "run")
    assert (tmp_path / "run" / "data" / "train.bin").read_bytes() == b"mine"
