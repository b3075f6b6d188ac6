"""`llama-fn train` and `llama-fn report`, in this process: what a user sees, and what is left in the folder."""

import json
import sys
from pathlib import Path

import pytest
from program import cli

from llama_fn.training import loop
from llama_fn.training.curve import color_of
from llama_fn.training.step import make_step

SIZES = ["--dim", "16", "--n-layers", "1", "--n-heads", "2", "--n-kv-heads", "1", "--hidden-dim", "20", "--context",
         "24", "--steps", "5", "--batch", "2", "--evaluate-every", "3"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(loop, "jit_step", make_step)  # what compiles is tested elsewhere, and takes 15 s each time
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the cat sat on the mat.\n" * 90)
    return tmp_path


def records(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_train_shows_and_keeps_what_is_measured_and_report_makes_a_page_of_it(place, monkeypatch, capsys):
    status, out, err = cli(monkeypatch, capsys, "train", "a.txt", "--out", "one", *SIZES, "--sample-every", "4",
                           "--prompts", "the cat", "the", "--sample-tokens", "5", "--tensorboard")
    assert (status, out != "") == (0, True)
    assert all(words in err for words in ("tokens to learn from", "loss ", " tokens/s", "MFU ", " GiB", " left",
                                          "step 3: validation loss", "step 4: the cat",
                                          "compiling:   0%|", "training: 100%|"))
    first, *rest = records("one")
    assert first["peak_flops"] > 1e7 and first["flops_per_token"] > 0 and first["steps"] == 5
    steps = [record for record in rest if "loss" in record]
    assert all(record.keys() == {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds",
                                 "tflops", "mfu", "memory"} for record in steps) and len(steps) == 5
    assert [record["step"] for record in rest if "sample" in record] == [4, 4, 5, 5]
    assert Path("one", "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len([*Path("one", "events").iterdir()]) == 1

    status, _, err = cli(monkeypatch, capsys, "train", "a.txt", "--out", "two", *SIZES, "--peak-tflops", "0")
    assert status == 0 and "TFLOP/s" in err and "MFU" not in err
    assert records("two")[0]["peak_flops"] is None
    assert not [record for record in records("two") if "mfu" in record or "sample" in record]
    assert not Path("two", "events").exists()

    assert cli(monkeypatch, capsys, "report", "one", "two") == (0, "report.html\n", "")
    page = Path("report.html").read_text()
    assert "2 training runs" in page and color_of(1) in page and "learning_rate" in page and "MFU, median" in page
    assert cli(monkeypatch, capsys, "report", "one", "--out", "pages/one.html")[0] == 0
    assert "Training run" in Path("pages/one.html").read_text()


@pytest.mark.parametrize("args, message", [
    (["report"], "llama-fn: report: at least one folder is needed"),
    (["report", "nowhere"], "llama-fn: nowhere: not the folder of a training run: it has no metrics.jsonl"),
    (["train", "a.txt", "--sample-every", "0"], "llama-fn: sample_every must be at least 1, got 0"),
    (["train", "a.txt", "--sample-tokens", "0", "--sample-every", "1"], "llama-fn: sample_tokens must be at least 1"),
    (["train", "a.txt", "--peak-tflops", "-1"], "llama-fn: peak_tflops must lie in [0, inf), got -1.0"),
    (["train", "a.txt", "--tensorboard"], "llama-fn: TensorBoard's events need the package tensorboard, which is not"),
])
def test_a_bad_request_is_one_line_before_any_work(place, monkeypatch, capsys, args, message):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    status, out, err = cli(monkeypatch, capsys, *args)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert sorted(file.name for file in place.iterdir()) == ["a.txt"]
