"""A run knows its plan, its texts and its files: with what it can be resumed, what it refuses, and how it stops."""

import dataclasses
import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from program import COMMAND, cli
from runs import TEXTS, edit_manifest, wait_for_snapshot
from runs import write_texts as write

import llama_fn as lf
from llama_fn.training import loop
from llama_fn.training.plan import Plan
from llama_fn.training.run import run
from llama_fn.training.step import make_step

SMALL = Plan(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=20, context=24, steps=4, batch=2)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(loop, "jit_step", make_step)  # what compiles is tested elsewhere, and takes 15 s each time


def stop_after(step: int):
    def report(record: dict) -> None:
        if record.get("step") == step and "loss" in record:
            signal.raise_signal(signal.SIGINT)
    return report


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder of texts, and the folder of a run on them that was stopped after step 2."""
    root = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "jit_step", make_step)
        run(root / "run", SMALL, write(root / "texts"), report=stop_after(2))
    return root


@pytest.fixture
def root(begun, tmp_path) -> Path:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- what a run knows

def test_a_run_goes_on_with_the_same_texts_wherever_they_lie_or_with_none(root, tmp_path):
    others = []
    shutil.copytree(root / "run", root / "again")
    (root / "texts").rename(root / "moved")
    for name, content in TEXTS.items():  # a mark, Windows's line ends, and other names in the same order are no change
        (root / "moved" / name).unlink()
        (root / "moved" / f"x{name}").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    (root / "moved" / "empty.txt").touch()
    for folder, texts in (("run", root / "moved"), ("again", None)):
        seen = []
        same = dataclasses.replace(SMALL, n_heads=None, n_kv_heads=None, hidden_dim=None, steps=None)
        model = run(root / folder, same, texts, resume=True, report=seen.append)
        assert [record["step"] for record in seen if "loss" in record] == [3, 4]  # what is open is as it was
        others.append(model)
    whole = run(root / "whole", SMALL, write(root / "texts"))
    for other in others:
        assert all(map(torch.equal, lf.tree.leaves(whole.params), lf.tree.leaves(other.params)))


@pytest.mark.parametrize("change, message", [
    ({"a.txt": "the cat sat on the hat.\n" * 30}, "a.txt differs"),
    ({"b.jsonl": '{"text": "the dog ran to the cat"}\n' * 30}, "b.jsonl differs"),
    ({"b.jsonl": TEXTS["b.jsonl"] + '{"text": "more"}'}, "b.jsonl differs"),
    ({"d.txt": "a new one"}, "d.txt is new"),
    ({"c.md": " \n"}, "c.md is missing"),
    ({"a.txt": TEXTS["c.md"], "c.md": TEXTS["a.txt"]}, "their order or number differs"),
    ({"d.txt": TEXTS["a.txt"]}, "their order or number differs"),
    ({"a.txt": "a", "b.jsonl": '{"text": "b"}', "c.md": "c", "d.md": "d", "e.md": "e"},
     "a.txt differs, b.jsonl differs, c.md differs and 2 more"),
])
def test_other_texts_are_refused_and_named_though_their_files_have_the_old_names(root, change, message):
    write(root / "texts", change)
    before = contents(root / "run")
    with pytest.raises(ValueError, match=f"run holds a run on other texts: {message}; resume without texts to go "):
        run(root / "run", SMALL, root / "texts", resume=True)
    assert contents(root / "run") == before


def test_texts_for_a_run_on_stories_are_refused(root):
    edit_manifest(root / "run", texts=None)
    with pytest.raises(ValueError, match="holds a run on the embedded stories; resume it without texts"):
        run(root / "run", SMALL, root / "texts", resume=True)


@pytest.mark.parametrize("name", ["data/train.bin", "data/valid.bin", "tokenizer.model"])
@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"",
                                    lambda data: bytes([*data[:9], data[9] ^ 1, *data[10:]])])
def test_a_damaged_file_is_named_and_made_again_once_it_is_removed(root, name, damage):
    file = root / "run" / name
    good = file.read_bytes()
    file.write_bytes(damage(good))
    with pytest.raises(ValueError, match=rf"{name}: damaged, or not of this run"):
        run(root / "run", SMALL, root / "texts", resume=True)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file; resume with the texts of the run"):
        run(root / "run", SMALL, resume=True)
    run(root / "run", SMALL, root / "texts", resume=True)
    assert file.read_bytes() == good


def test_a_run_of_an_earlier_version_goes_on_and_says_what_it_cannot_tell(root):
    edit_manifest(root / "run", sha256=..., texts="texts", optimizer=..., decay=...)
    with pytest.warns(UserWarning, match="has no digests of the texts: whether these are the same cannot be told"):
        run(root / "run", SMALL, root / "texts", resume=True)
    assert {"sha256", "texts", "optimizer"} <= json.loads((root / "run" / "run.json").read_text()).keys()
    run(root / "run", SMALL, root / "texts", resume=True)  # now it can be told


def test_a_record_that_is_no_object_is_an_error(root):
    (root / "run" / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json: not what a training run writes there"):
        run(root / "run", SMALL, resume=True)


@pytest.mark.parametrize("changes", [{"texts": [1]}, {"texts": [{"name": "a"}]}, {"sha256": "x"}, {"steps": "many"},
                                     {"texts": [{"name": "a", "sha256": []}]}, {"warmup": [1]}, {"steps": 0},
                                     {"steps": None}, {"n_heads": 3}, {"clip": "1"}, {"dim": True},
                                     {"optimizer": "sgd"}, {"optimizer": ["muon"]}, {"decay": 1}])
def test_a_record_that_is_none_is_an_error(root, changes):
    edit_manifest(root / "run", **changes)
    with pytest.raises(ValueError, match=r"run\.json: not what a training run writes there") as error:
        run(root / "run", dataclasses.replace(SMALL, steps=None), root / "texts", resume=True)
    assert all(name in str(error.value) for name in changes if name not in ("texts", "sha256"))


@pytest.mark.parametrize("changes", [{"steps": 5}, {"seed": 1}, {"texts": None}])
def test_a_record_that_was_edited_is_an_error(root, changes):
    """Its checksum is not that of its entries. Without one it is the record of an earlier version."""
    record = json.loads((root / "run" / "run.json").read_text())
    (root / "run" / "run.json").write_text(json.dumps({**record, **changes}))
    with pytest.raises(ValueError, match=r"run\.json: damaged, or edited"):
        run(root / "run", SMALL, root / "texts", resume=True)


def test_the_runs_own_folder_among_the_texts_is_none_of_them(tmp_path):
    write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", SMALL, tmp_path, report=stop_after(1))
    run(tmp_path / "run", SMALL, tmp_path, resume=True)
    assert (tmp_path / "run" / "params.json").is_file()


# --- more steps

def test_a_run_goes_on_for_more_steps_along_the_longer_plans_schedule(root):
    run(root / "run", SMALL, root / "texts", resume=True)
    longer, seen = dataclasses.replace(SMALL, steps=7), []
    with pytest.warns(UserWarning, match="a run of 4 steps becomes one of 7; from step 5 on the learning rate follows"):
        run(root / "run", longer, root / "texts", resume=True, report=seen.append)
    assert [record["step"] for record in seen if "loss" in record] == [5, 6, 7]
    assert json.loads((root / "run" / "run.json").read_text())["steps"] == 7
    again = run(root / "run", longer, root / "texts", resume=True)  # of now so many steps
    with pytest.raises(ValueError, match="holds a run that has taken 7 steps; it cannot end after 6"):
        run(root / "run", dataclasses.replace(SMALL, steps=6), root / "texts", resume=True)

    # The same by hand: four steps of the one plan, three of the other.
    from llama_fn.training.data import open_corpus
    plan = dataclasses.replace(SMALL, vocab_size=again.tokenizer.vocab_size)
    corpus = open_corpus(root / "run" / "data" / "train.bin", again.tokenizer, 24)
    init, order, _, _ = lf.random.split(lf.random.key(0), 4)
    state = loop.init_state(lf.init_params(init, plan.config()), plan.make_optimizer())
    for steps, warmup in ((4, 1), (7, 1)):  # the warmup is as it was: a quarter of 4
        optimizer = dataclasses.replace(plan, steps=steps, warmup=warmup).make_optimizer()
        *_, (state, _) = loop.train(state, optimizer, corpus, order, steps, (1, 2))
    assert all(map(torch.equal, lf.tree.leaves(state.params), lf.tree.leaves(again.params)))


# --- the optimizer

@pytest.mark.parametrize(("optimizer", "decay"), [("adamw", "cosine"), ("adamw", "linear"), ("muon", "cosine")])
def test_a_plan_has_the_optimizer_and_the_schedule_that_it_names(optimizer, decay):
    """Three updates of the same gradients, beside the optimizer written out."""
    plan = Plan(steps=5, warmup=1, optimizer=optimizer, decay=decay, learning_rate=0.1, final_learning_rate=0.02,
                weight_decay=0.3, clip=0.5)
    curve = {"cosine": lf.optim.warmup_cosine, "linear": lf.optim.warmup_linear}[decay](0.1, 1, 5, 0.02)
    make = {"adamw": lf.optim.adamw, "muon": lf.optim.muon}[optimizer]
    expected = lf.optim.chain(lf.optim.clip_by_global_norm(0.5),
                              make(curve, b2=0.99, weight_decay=0.3, mask=lf.optim.matrices))
    params = lf.init_params(lf.random.key(0), SMALL.config())
    grads = lf.random.like(lf.random.key(1), params)
    found = []
    for made in (expected, plan.make_optimizer()):
        at, state = params, made.init(params)
        for _ in range(3):
            updates, state = made.update(grads, state, at)
            at = lf.optim.apply_updates(at, updates)
        found.append(at)
    assert all(map(torch.equal, lf.tree.leaves(found[0]), lf.tree.leaves(found[1])))


@pytest.mark.parametrize(("name", "word"), [("optimizer", "sgd"), ("optimizer", None), ("decay", "constant")])
def test_an_unknown_word_in_a_plan_is_refused_with_those_that_are_known(tmp_path, name, word):
    known = {"optimizer": "adamw, muon", "decay": "cosine, linear"}[name]
    with pytest.raises(ValueError, match=f"{name} must be one of {known}; got {word!r}"):
        run(tmp_path / "run", dataclasses.replace(SMALL, **{name: word}))
    assert not (tmp_path / "run").exists()


def test_a_run_of_muon_that_stopped_ends_as_one_that_did_not(tmp_path):
    plan, texts = dataclasses.replace(SMALL, optimizer="muon", decay="linear"), write(tmp_path / "texts")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", plan, texts, report=stop_after(2))
    found = [run(tmp_path / name, plan, texts, resume=resume) for name, resume in (("stopped", True), ("whole", False))]
    assert all(map(torch.equal, lf.tree.leaves(found[0].params), lf.tree.leaves(found[1].params)))
    with pytest.raises(ValueError, match="another plan: optimizer was 'muon', is 'adamw'"):
        run(tmp_path / "whole", SMALL, texts, resume=True)


# --- what was not given

@given(st.integers(1, 10**6))
def test_any_number_of_steps_has_a_warmup_that_fits(steps):
    plan = Plan(steps=steps).filled()
    plan.make_optimizer()
    assert plan.warmup == (100 if steps >= 400 else steps // 4)


@given(st.integers(1, 600).map(lambda half: 2 * half), st.none() | st.integers(1, 5))
def test_any_even_width_has_heads_and_a_hidden_width(dim, kv):
    if kv is None or any(n % kv == 0 and dim % n == 0 and dim // n % 2 == 0 for n in range(1, 7)):
        config = Plan(dim=dim, n_kv_heads=kv).config()
        assert config.n_heads <= 6 and config.hidden_dim >= dim


def test_the_defaults_are_those_of_the_shipped_model():
    assert Plan().config() == lf.load("stories").params.config
    assert (Plan().filled().steps, Plan().filled().warmup) == (4000, 100)


@pytest.mark.parametrize("text", ["a", "ab\n", "the cat", "\u4e00" * 3 + "\n",
                                  "".join(map(chr, range(0x4e00, 0x4e00 + 1500))) * 2])
def test_any_text_trains_with_a_vocabulary_that_was_not_given(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    model = run(tmp_path / "run", dataclasses.replace(SMALL, steps=1), tmp_path / "t.txt")
    assert model.tokenizer == lf.load(tmp_path / "run").tokenizer
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


@pytest.mark.parametrize("steps, evaluated", [(1, [1]), (3, [1, 2, 3]), (9, [2, 4, 6, 8, 9])])
def test_a_short_run_is_evaluated_at_every_quarter(tmp_path, steps, evaluated):
    seen = []
    run(tmp_path / "run", dataclasses.replace(SMALL, steps=steps), write(tmp_path / "texts"), report=seen.append)
    assert [record["step"] for record in seen if "valid_loss" in record] == evaluated


# --- errors and Ctrl-C

@pytest.mark.parametrize("args", [["--vocab-size", "9999"], ["--warmup", "50", "--steps", "50"], ["--dim", "7"],
                                  ["--steps", "0"], ["--device", "warp"]])
def test_an_error_comes_before_any_progress(tmp_path, monkeypatch, capsys, args):
    status, out, err = cli(monkeypatch, capsys, "train", str(write(tmp_path / "texts")), "--out",
                           str(tmp_path / "run"), *args)
    assert status == 2 and not out and err.startswith("llama-fn: ") and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_bad_line_far_into_the_texts_is_found_before_the_tokenizer_is_learned(tmp_path, monkeypatch, capsys):
    write(tmp_path / "texts", {**TEXTS, "z.jsonl": '{"text": "a"}\n' * 99 + "{"})
    monkeypatch.setattr(lf.training.prepare, "train_tokenizer", None)
    status, _, err = cli(monkeypatch, capsys, "train", str(tmp_path / "texts"), "--out", str(tmp_path / "run"))
    assert status == 2 and "z.jsonl, line 100: not JSON" in err and not (tmp_path / "run").exists()


def test_the_first_ctrl_c_is_answered_at_once_and_the_second_stops_at_once(tmp_path, capsys, monkeypatch):
    texts, heard = write(tmp_path / "texts"), []

    def twice(record: dict) -> None:
        if record.get("step") == 3 and "loss" in record:
            wait_for_snapshot(tmp_path / "run", 2)  # which the second signal would give up
            signal.raise_signal(signal.SIGINT)
            heard.append(capsys.readouterr().err)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", dataclasses.replace(SMALL, steps=8), texts, report=twice)
    assert heard == ["\nstops after this step; press Ctrl-C again to stop now\n"]
    seen = []
    run(tmp_path / "run", dataclasses.replace(SMALL, steps=8), texts, resume=True, report=seen.append)
    assert seen[0]["step"] == 2  # the last evaluation's state is whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_compiler_that_ctrl_c_ends_too_is_no_error(tmp_path, monkeypatch):
    def killed(*args):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("C++ compile error")

    monkeypatch.setattr(loop, "jit_step", lambda optimizer, **options: killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", SMALL, write(tmp_path / "texts"))


@pytest.mark.parametrize("stage", ["train_tokenizer", "encode_corpus"])
def test_ctrl_c_while_the_texts_are_prepared_leaves_nothing(tmp_path, monkeypatch, capsys, stage):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(lf.training.prepare, stage, interrupted)
    status, out, err = cli(monkeypatch, capsys, "train", str(write(tmp_path / "texts")), "--out", str(tmp_path / "run"))
    assert (status, out, err) == (130, "", "stopped before the first step; nothing was kept\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_while_a_run_compiles_is_answered_at_once(tmp_path):
    write(tmp_path / "texts")
    sizes = ["--dim", "16", "--n-layers", "1", "--context", "24", "--batch", "2", "--steps", "50"]
    with subprocess.Popen([*COMMAND, "train", "texts", "--out", "run", *sizes], stderr=subprocess.PIPE, text=True,
                          cwd=tmp_path) as process:
        seen = ""
        for awaited in ("compiling", "press Ctrl-C again to stop now"):
            while awaited not in seen:
                seen += (new := process.stderr.read(1))
                assert new, seen
            process.send_signal(signal.SIGINT)
        seen += process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in seen
    assert "stopped before the first snapshot; begin again with --resume --out run" in seen


@pytest.mark.slow
def test_a_pipe_is_refused_where_texts_are_read_several_times(tmp_path):
    done = subprocess.run([*COMMAND, "train", "/dev/stdin", "--out", str(tmp_path / "run")], input="a text",
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "/dev/stdin: not a file; a run reads its texts several times" in done.stderr
