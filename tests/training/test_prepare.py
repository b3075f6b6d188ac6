"""The files that a run learns from: what is held out, what is learned of dialogs, and the progress."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_fn as lf
from llama_fn.training import prepare
from llama_fn.training.plan import Plan
from llama_fn.training.prepare import held_out, sources_of_files
from llama_fn.training.run import run
from llama_fn.training.shard import open_shard
from llama_fn.training.step import make_step
from llama_fn.training.texts import Dialog, Document, Prompt, documents

LINES = [f"the cat number {i} sat on the mat.\n" for i in range(60)]


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


def test_a_tokenizer_learns_from_all_of_a_text_or_from_even_parts_of_a_large_one(folder, monkeypatch):
    file = write(folder / "h.jsonl", LINES)
    whole = list(sources_of_files([file]).tokenizer())
    assert whole == split(file)[0]
    monkeypatch.setattr(prepare, "LEARNED_FROM", file.stat().st_size // 7 + 1)
    assert list(sources_of_files([file]).tokenizer()) == whole[::7]
    monkeypatch.setattr("llama_fn.training.encode.PIECE", 100)
    (folder / "i.txt").write_text("".join(LINES))
    parts = list(sources_of_files([folder / "i.txt"]).tokenizer())
    assert all(part in "".join(LINES) and len(part) < 140 for part in parts) and 2 <= len(parts) <= 4


# --- preparing

def test_progress_counts_every_byte_of_every_file(tmp_path):
    said = []
    file = write(tmp_path / "a.jsonl", [line + "\u00e9" for line in LINES])
    prepare.prepare(tmp_path / "run", 300, sources_of_files([file]), report=lambda *what: said.append(what))
    train, valid = split(file)
    assert said[0] == ("tokenizer.model", 0, None)
    for name, texts, share in (("data/train.bin", train, 19), ("data/valid.bin", valid, 1)):
        own = [rest for where, *rest in said if where == name]
        assert own[0] == [0, file.stat().st_size * share // 20] and {size for _, size in own} == {own[0][1]}
        assert sum(count for count, _ in own) == sum(len(text.encode()) for text in texts)


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


def test_a_run_of_an_earlier_version_goes_on_with_its_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_fn.training.loop.jit_step", make_step)
    plan = Plan(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=20, context=24, steps=1, batch=2)
    model, folder = run(tmp_path / "run", plan, write(tmp_path / "a.jsonl", LINES)), tmp_path / "run"
    whole = {name: (folder / name).read_bytes() for name in prepare.FILES}
    manifest = json.loads((folder / "run.json").read_text())
    for part in ("train", "valid"):
        tokens = open_shard(folder / "data" / f"{part}.bin", model.tokenizer).tokens.tobytes()
        (folder / "data" / f"{part}.bin").write_bytes(tokens)
        manifest["sha256"][f"data/{part}.bin"] = hashlib.sha256(tokens).hexdigest()
    del manifest["checksum"]  # earlier versions wrote none
    (folder / "run.json").write_text(json.dumps(manifest))
    for steps in (2, 3):  # converted, and as it then is
        with pytest.warns(UserWarning, match="becomes one of"):
            run(folder, dataclasses.replace(plan, steps=steps), resume=True)
        assert {name: (folder / name).read_bytes() for name in prepare.FILES} == whole
