"""A training run in a folder: a resumed run gives the same bits, ends in a model, and refuses bad requests."""

import json
import signal

import pytest
import torch

import llama_fn as lf
from llama_fn.training import loop, prepare
from llama_fn.training.curve import plot_curves
from llama_fn.training.plan import Plan
from llama_fn.training.run import run
from llama_fn.training.step import make_step

TINY = Plan(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, hidden_dim=70, vocab_size=330, context=40, steps=6, batch=5,
            warmup=2, stories=60)
TIMES = ("seconds", "tokens_per_second", "tflops", "mfu", "memory")


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch) -> None:
    """50 stories instead of 1000, on which each evaluation takes 3 s."""
    monkeypatch.setattr(prepare, "VALIDATION_STORIES", 50)


def records(folder) -> list[dict]:
    """The metrics without the times in them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES}
            for record in lines if "parameters" not in record]


@pytest.mark.slow
def test_resume_equals_not_stopping_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "jit_step", make_step)  # what compiles is tested elsewhere, and takes 15 s each time
    whole = run(tmp_path / "whole", TINY, evaluate_every=2)

    def stop_after_three(record):
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of a step

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", TINY, evaluate_every=2, report=stop_after_three)
    assert not (tmp_path / "two" / "params.json").exists()
    seen = []
    halves = run(tmp_path / "two", TINY, evaluate_every=2, resume=True, report=seen.append)
    assert [record["step"] for record in seen if "loss" in record] == [4, 5, 6]
    assert all(map(torch.equal, lf.tree.leaves(whole.params), lf.tree.leaves(halves.params)))
    assert records(tmp_path / "whole") == records(tmp_path / "two")

    loaded = lf.load(tmp_path / "whole")
    assert all(map(torch.equal, lf.tree.leaves(loaded.params), lf.tree.leaves(whole.params)))
    assert loaded.tokenizer == whole.tokenizer and loaded.params.config.max_seq_len == 40
    assert plot_curves(tmp_path / "whole" / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [r["step"] for r in records(tmp_path / "whole") if "valid_loss" in r] == [2, 4, 6]
    assert records(tmp_path / "whole")[0]["loss"] == pytest.approx(5.8, abs=0.3)  # log 330 = 5.8

    with pytest.raises(ValueError, match="holds a training run already; go on with it"):
        run(tmp_path / "whole", TINY)
    with pytest.raises(ValueError, match="holds a run of another plan: batch was 5, is 9"):
        run(tmp_path / "whole", TINY.__class__(**{**vars(TINY), "batch": 9}), resume=True)


@pytest.mark.slow
def test_a_run_whose_last_save_was_interrupted_goes_on_with_its_tokenizer(tmp_path, monkeypatch):
    """All files of the model may lie in `.complete` alone."""
    monkeypatch.setattr(loop, "jit_step", make_step)
    whole = run(tmp_path / "run", TINY)
    (tmp_path / "run" / ".complete").mkdir()
    for name in ("tokenizer.model", "params.json", "consolidated.00.pth"):
        (tmp_path / "run" / name).rename(tmp_path / "run" / ".complete" / name)
    monkeypatch.setattr(prepare, "train_tokenizer", None)
    again = run(tmp_path / "run", TINY, resume=True)
    assert again.tokenizer == whole.tokenizer and not (tmp_path / "run" / ".complete").exists()
    assert all(map(torch.equal, lf.tree.leaves(lf.load(tmp_path / "run").params), lf.tree.leaves(whole.params)))


@pytest.mark.slow
def test_a_text_of_ones_own_is_learned(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 400)
    plan = Plan(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, hidden_dim=70, vocab_size=290, context=32, steps=60,
                batch=8, warmup=5, learning_rate=1e-2)
    model = run(tmp_path / "run", plan, tmp_path / "text.txt", evaluate_every=60)
    last = records(tmp_path / "run")[-1]
    assert last["valid_loss"] < 0.2 and "floor" not in last
    (text,) = lf.text_completion(model, ["the cat sat"], key=lf.random.key(0), max_new_tokens=20,
                                 sampler=lf.sampler(0.0))
    assert text.text.startswith(" on the mat.")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    from llama_fn.training import loop

    monkeypatch.setattr(loop, "jit_step", make_step)
    params = lf.init_params(lf.random.key(0), TINY.config())
    broken = params._replace(norm=params.norm * float("nan"))
    texts = [story.text for story in lf.stories.stories(lf.random.key(0), 9)]
    tokenizer = lf.train_tokenizer(texts, 330)
    from llama_fn.training.data import encode_corpus, open_corpus

    encode_corpus(texts, tokenizer, tmp_path / "train.bin")
    corpus = open_corpus(tmp_path / "train.bin", tokenizer, 40)
    state = loop.init_state(broken, lf.optim.sgd(0.1))
    with pytest.raises(ValueError, match="step 10: the loss is nan and .* nan, not finite for 10 steps in a row"):
        list(loop.train(state, lf.optim.sgd(0.1), corpus, lf.random.key(0), 12, (1, 2)))


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no training run; choose another folder"):
        run(tmp_path, TINY)
    with pytest.raises(FileNotFoundError, match="there is no run to go on with"):
        run(tmp_path / "new", TINY, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_the_texts_are_looked_at_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        run(tmp_path / "run", TINY, tmp_path / "nothing.txt")
    (tmp_path / "short.txt").write_text("too short for so many tokens")
    with pytest.raises(ValueError, match=r"no tokenizer of 330 tokens can be learned from these texts: .* <= \d+"):
        run(tmp_path / "run", TINY, tmp_path / "short.txt")
    assert not (tmp_path / "run").exists()
