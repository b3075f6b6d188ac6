"""`inspect`, `perplexity` and `choose`: what they tell, and what they refuse."""

import json
import os

import pytest
import torch
from program import cli

import llama_fn as lf
from llama_fn.cli import inspect as inspecting
from llama_fn.generation.perplexity import Perplexity


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: cli(monkeypatch, capsys, *map(str, args))


def edit(file: str, **changes) -> None:
    with open(file) as old:
        settings = json.load(old) | changes
    with open(file, "w") as new:
        json.dump(settings, new)


@pytest.mark.parametrize(("format", "said"), [("meta", "Meta's"), ("hf", "Hugging Face's"), ("llama2c", "llama2.c's")])
def test_inspect_tells_what_is_there_and_reads_no_weights(run, monkeypatch, model, format, said):
    lf.save(model, "there", format=format)
    opened = inspecting.open_weights
    monkeypatch.setattr(inspecting, "open_weights", lambda *args: opened(*args)._replace(read=None))
    status, out, err = run("inspect", "there")
    assert (status, err) == (0, "")
    told = {line[:16].strip(): line[16:] for line in out.splitlines()}
    config = model.params.config
    assert told == {
        "format": f"{said}, 1 file of weights", "dim": "48", "n_layers": "4", "n_heads": "6", "n_kv_heads": "2",
        "vocab_size": "401", "hidden_dim": "70", "norm_eps": "1e-05", "rope_theta": "10000.0", "max_seq_len": "96",
        "head_dim": "8", "parameters": f"{config.n_params:,}", "tokenizer": "401 tokens",
        "tensors": f"39, {4 * config.n_params:,} bytes, float32"}


def test_inspect_lists_what_is_wrong_and_has_status_1(run, model):
    lf.save(model, "bad")
    state = torch.load("bad/consolidated.00.pth")
    del state["norm.weight"]
    state["output.weight"] = state["output.weight"][:, :7].clone()
    state["stray"] = torch.zeros(3)
    torch.save(state, "bad/consolidated.00.pth")
    os.remove("bad/tokenizer.model")
    status, out, err = run("inspect", "bad")
    assert (status, err) == (1, "")
    assert [line for line in out.splitlines() if line.startswith("wrong: ")] == [
        "wrong: missing: norm.weight in consolidated.00.pth",
        "wrong: output.weight in consolidated.00.pth: should be [401, 48], is float32[401, 7]",
        "wrong: unknown: stray in consolidated.00.pth"]
    assert f"{'tokenizer':<16}none\n" in out
    with pytest.raises(ValueError, match="3 weights do not fit the settings"):
        lf.load("bad")


def test_inspect_tells_what_is_odd(run, model):
    lf.save(model, "odd")
    edit("odd/params.json", mystery=1, another=2)
    status, out, _ = run("inspect", "odd")
    assert status == 0
    assert "odd: odd/params.json: unknown settings, left out of account: another, mystery\n" in out


def test_inspect_tells_of_tied_weights(run, model):
    lf.save(model._replace(params=model.params._replace(output=model.params.embedding)), "tied", format="hf")
    status, out, _ = run("inspect", "tied")
    assert status == 0 and "(embedding and output are one matrix)" in out and "38, " in out


def test_inspect_of_what_is_no_model_has_status_2(run, model, tmp_path):
    assert run("inspect", "nowhere")[2].startswith("llama-fn: nowhere: no model there: ")
    lf.save(model, "bad", format="hf")
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"none")
    status, out, err = run("inspect", "bad")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("llama-fn: bad/model.safetensors: not a safetensors file, or a damaged one: ")


def test_perplexity_is_that_of_all_texts_together(run, texts, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    model = lf.load("stories")
    for options, settings in (((), ()), (("--window", "40", "--stride", "9"), (40, 9)),
                              (("-c", "40", "--stride", "9"), (40, 9))):
        parts = [lf.perplexity(model, text, *settings) for text in texts[:3]]
        whole = Perplexity(*map(sum, zip(*parts, strict=True)))
        status, out, err = run("perplexity", "t.jsonl", *options)
        assert status == 0 and f" {whole.tokens}/{whole.tokens} " in err
        assert out.splitlines() == [
            f"perplexity    {whole.perplexity:.4f}", f"bits a byte   {whole.bits_per_byte:.4f}",
            f"nats a token  {whole.nats / whole.tokens:.4f}",
            f"tokens        {whole.tokens:,} of {whole.bytes:,} bytes, in 3 texts"]
    (tmp_path / "t.txt").write_text(texts[0])
    assert run("perplexity", "t.txt")[1].endswith("in 1 text\n")


def test_choose_tells_the_likeliest_first(run):
    options = (" stone", " time", " little river")
    scores = lf.score_options(lf.load("stories"), "Once upon a", options)
    shares = torch.tensor([score.log_ratio for score in scores]).softmax(0).tolist()
    status, out, err = run("choose", "Once upon a", *options)
    head, *rows = out.splitlines()
    assert (status, err, head) == (0, "", "share    bits a byte  option")
    assert rows[0].endswith("   time")
    assert [row.split()[0] for row in rows] == [f"{share:.2%}" for share in sorted(shares, reverse=True)]
    assert sorted(row[22:] for row in rows) == sorted(options)
    assert {row[22:]: row[9:20].strip() for row in rows} == {
        option: f"{score.bits_per_byte:.4f}" for option, score in zip(options, scores, strict=True)}


def test_choose_tells_the_same_bits_of_one_option_as_beside_others(run):
    rows = {}
    for options in ([" a kind"], [" a kind little boy"], [" a kind", " a kind little boy"]):
        _, *told = run("choose", "Once upon a time there was", *options)[1].splitlines()
        for row in told:
            rows.setdefault(row[22:], set()).add(row[9:20].strip())
    assert rows == {" a kind": {"0.4253"}, " a kind little boy": {"0.2756"}}


@pytest.mark.parametrize(("args", "message"), [
    (["perplexity", "nowhere"], "nowhere: no such file or folder"),
    (["perplexity", "empty.txt"], "empty.txt: no text in it"),
    (["perplexity", "text.txt", "--window", "999"], "window must lie in [1, 256], the model's context, got 999"),
    (["perplexity", "text.txt", "--window", "9", "--stride", "10"], "stride must lie in [1, 9], the window, got 10"),
    (["perplexity", "text.txt", "--model", "nowhere"], "nowhere: no model there"),
    (["choose", "Once", ""], "option 0 is empty: there is nothing to score"),
    (["choose", "word " * 300, "a", "b"], "the prompt with option 0 has "),
])
def test_bad_input_is_one_line_and_status_2(run, tmp_path, args, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "text.txt").write_text("Once upon a time")
    status, out, err = run(*args)
    lines = [line for line in err.splitlines() if line.startswith("llama-fn")]
    assert (status, out) == (2, "") and len(lines) == 1 and lines[0].startswith(f"llama-fn: {message}"), err
    assert "Traceback" not in err
