"""The progress bar while texts become tokens."""

import itertools
import json
from contextlib import contextmanager

from program import cli

from llama_fn.cli.preparing_bar import preparing_bar
from llama_fn.training.step import make_step

SIZES = ["--dim", "16", "--n-layers", "1", "--n-heads", "2", "--context", "24", "--batch", "2", "--steps", "1"]


def test_each_file_has_a_bar_of_its_own_that_goes(capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    with preparing_bar() as report:
        report("data/train.bin", 0, 2000)
        report("data/train.bin", 1000, 2000)
        report("data/train.bin", 1500, 2000)  # more than was estimated
        report("data/valid.bin", 0, None)
        report("data/valid.bin", 30, None)
    shown = capsys.readouterr().err
    assert "/2.00k" in shown and "data/valid.bin: 30.0B" in shown
    assert shown.rstrip("\r").endswith(" ")  # cleared


def test_without_any_progress_nothing_is_drawn(capsys):
    with preparing_bar() as report:
        report("tokenizer.model", 0, None)
    assert capsys.readouterr().err == ""


def test_chats_and_prompts_train_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llama_fn.training.loop.jit_step", make_step)
    dialogs = [{"messages": [{"role": "user", "content": f"Is {i} even?"},
                             {"role": "assistant", "content": "no" if i % 2 else "yes"}]} for i in range(30)]
    prompts = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*dialogs, *prompts]))
    texts, out = str(tmp_path / "a.jsonl"), str(tmp_path / "run")
    status, _, err = cli(monkeypatch, capsys, "train", texts, "--out", out, *SIZES)
    assert status == 0 and "step 1: validation loss" in err


def test_the_bar_goes_before_that_of_the_training_comes(tmp_path, monkeypatch, capsys):
    events = []

    @contextmanager
    def preparing():
        yield lambda *_: events.append("prepares")
        events.append("is prepared")

    @contextmanager
    def training(first_line):
        yield lambda record: events.append("trains")

    monkeypatch.setattr("llama_fn.training.loop.jit_step", make_step)
    monkeypatch.setattr("llama_fn.cli.train.preparing_bar", preparing)
    monkeypatch.setattr("llama_fn.cli.train.training_bar", training)
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 40 + "\n\n" + "a dog ran. " * 40)
    status, _, err = cli(monkeypatch, capsys, "train", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"), *SIZES)
    assert status == 0, err
    assert [event for event, _ in itertools.groupby(events)] == ["prepares", "is prepared", "trains"]
