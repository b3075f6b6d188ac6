"""`llama-fn finetune`: results in the format that the model came in, as transformers and peft read them."""

import json
import signal
import warnings

import pytest
import torch
from adapters import trained
from folders import same
from hugging_face import logits_of, silence, theirs  # noqa: F401, a fixture
from program import cli
from strategies import token_rows
from transformers import LlamaForCausalLM

import llama_fn as lf
from llama_fn import lora
from llama_fn.training import tune

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
CHAT = [{"messages": [{"role": "user", "content": f"Who sat on hill {i}?"},
                      {"role": "assistant", "content": "A fox."}]} for i in range(6)]
PREFERENCES = [{"prompt": f"Once {i}", "chosen": " upon a time", "rejected": " the fox sat"} for i in range(6)]
SHORT = ["--steps", "3", "--batch", "2", "--learning-rate", "1e-2"]
TUNED = ["--rank", "3", "--targets", "wq", "wo", "w_up", "output", "--alpha", "7"]


@pytest.fixture
def place(tmp_path, monkeypatch, model):
    """The folder in which the program runs: a model in Meta's format and in Hugging Face's, and examples."""
    monkeypatch.chdir(tmp_path)
    lf.save(model, "meta")
    lf.save(model, "hf", format="hf")
    for name, records in (("chat", CHAT), ("preferences", PREFERENCES)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def finetune(monkeypatch, capsys, *args: str) -> str:
    status, out, err = cli(monkeypatch, capsys, "finetune", *args)
    assert (status, out) == (0, ""), err
    return err


def losses(folder) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_come_back_in_hugging_faces_format(place, monkeypatch, capsys, model, tied):
    if tied:
        lf.save(model._replace(params=model.params._replace(output=model.params.embedding)), "tied", format="hf")
    err = finetune(monkeypatch, capsys, "tied" if tied else "hf", "chat.jsonl", "--out", "tuned", *SHORT)
    assert "tuned: the model, hf" in err
    found, tokens = losses(place / "tuned"), token_rows(model.params.config, 3, 20)
    assert found[-1] < 0.9 * found[0]
    tuned = lf.load("tuned")
    assert tuned.tokenizer == model.tokenizer and tuned.params.config == model.params.config
    ours, _ = lf.forward(tuned.params, tokens)
    torch.testing.assert_close(ours, logits_of(LlamaForCausalLM.from_pretrained("tuned").eval(), tokens), atol=1e-4,
                               rtol=0)
    assert (ours - lf.forward(model.params, tokens)[0]).abs().max() > 0.05


def test_all_weights_come_back_in_metas_format(place, monkeypatch, capsys, model):
    half = model._replace(params=lf.tree.map(lambda x: x.bfloat16(), model.params))
    lf.save(half, "half")
    finetune(monkeypatch, capsys, "half", "chat.jsonl", "--out", "tuned", *SHORT)
    before, after = (torch.load(place / name / "consolidated.00.pth") for name in ("half", "tuned"))
    assert {name: (x.shape, x.dtype) for name, x in before.items()} == {
        name: (x.shape, x.dtype) for name, x in after.items()}
    assert not any(torch.equal(before[name], after[name]) for name in before if "rope" not in name)
    assert (place / "half/params.json").read_text() == (place / "tuned/params.json").read_text()
    assert losses(place / "tuned")[-1] < losses(place / "tuned")[0]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["hf", "meta", "int4"])
@pytest.mark.parametrize("data", ["chat", "preferences"])
def test_peft_loads_the_adapter_and_gives_the_same_logits(place, monkeypatch, capsys, model, base, data):
    from peft import AutoPeftModelForCausalLM, PeftModel

    args = [*TUNED, *SHORT, *["--dpo"] * (data == "preferences"), *["--quantize", "int4"] * (base == "int4")]
    err = finetune(monkeypatch, capsys, "hf" if base == "hf" else "meta", f"{data}.jsonl", "--out", "tuned", *args)
    assert "tuned: an adapter of" in err and losses(place / "tuned")[-1] < losses(place / "tuned")[0]
    tokens, adapter = token_rows(model.params.config, 3, 20), lora.load("tuned", model.params)
    assert len(adapter.matrices) == 3 * 4 + 1 and adapter.scale.alpha == 7
    ours, _ = lf.forward(lora.apply(model.params, adapter), tokens)
    with warnings.catch_warnings():
        if base == "hf":  # the settings name the model
            peft = AutoPeftModelForCausalLM.from_pretrained("tuned")
        else:
            peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("hf"), "tuned")
    torch.testing.assert_close(ours, logits_of(peft.eval(), tokens), atol=1e-4, rtol=0)
    assert (ours - lf.forward(model.params, tokens)[0]).abs().max() > 0.01


def test_each_file_has_an_adapter_of_its_own(place, monkeypatch, capsys, model):
    (place / "each").mkdir()
    for name, answer in (("fox", "A fox."), ("hill", "The hill, of course.")):
        records = [{"prompt": f"Who was it {i}?", "completion": f" {answer}"} for i in range(5)]
        (place / "each" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    finetune(monkeypatch, capsys, "meta", "each", "--each", "--out", "tuned", *TUNED, *SHORT)
    first, last = losses(place / "tuned")[0], losses(place / "tuned")[-1]
    assert len(first) == 2 and all(b < a for a, b in zip(first, last, strict=True))
    fox, hill = (lora.load(place / "tuned" / name, model.params) for name in ("fox", "hill"))
    assert not same(fox, hill)
    for tuned, other, name in ((fox, hill, "fox"), (hill, fox, "hill")):
        prompt = model.tokenizer.encode("Who was it 1?")
        whole = torch.tensor(model.tokenizer.encode(f"Who was it 1? {'A fox.' if name == 'fox' else 'The hill.'}"))
        mask = torch.arange(len(whole)) >= len(prompt)
        own, others = (float(lf.loss(lora.apply(model.params, x), whole, mask)) for x in (tuned, other))
        assert own < others


def test_an_adapter_is_trained_further(place, monkeypatch, capsys, model):
    start = trained(lf.random.key(0), model.params, 2, ("wq", "w_up"))
    lora.save(start, "start", model.params)
    finetune(monkeypatch, capsys, "meta", "preferences.jsonl", "--dpo", "--adapter", "start", "--out", "tuned", *SHORT)
    found = lora.load("tuned", model.params)
    assert found.matrices.keys() == start.matrices.keys() and found.scale == start.scale and not same(found, start)
    assert losses(place / "tuned")[0] == pytest.approx(0.6931, abs=1e-4)  # the reference is the adapter as it was


def test_a_run_that_is_stopped_is_resumed(place, monkeypatch, capsys, model):
    args = ["meta", "chat.jsonl", *TUNED, *SHORT]
    finetune(monkeypatch, capsys, *args, "--out", "whole")
    taken = tune.take_steps

    def stopped(*given):
        for i, step in enumerate(taken(*given)):
            if i == 1:
                signal.raise_signal(signal.SIGINT)
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(tune, "take_steps", stopped)
        status, out, err = cli(patch, capsys, "finetune", *args, "--out", "two", "--evaluate-every", "9")
    assert (status, out) == (130, "") and "stopped; go on with --resume and the same arguments (two)" in err
    assert not (place / "two" / "adapter_config.json").exists()
    finetune(monkeypatch, capsys, *args, "--out", "two", "--evaluate-every", "9", "--resume")
    assert same(*(lora.load(name, model.params) for name in ("whole", "two")))


@pytest.mark.parametrize("args, message", [
    (["nowhere", "chat.jsonl"], "nowhere: no model there"),
    (["meta", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
    (["meta", "chat.jsonl", "--dpo"], 'chat.jsonl, line 1: a preference needs "prompt"'),
    (["meta", "preferences.jsonl"], 'preferences.jsonl, line 1: a record needs "text"'),
    (["meta", "chat.jsonl", "--rank", "0"], "rank must be at least 1, got 0"),
    (["meta", "chat.jsonl", "--rank", "2", "--targets", "wz"], "lora.init: 'wz' is no weight that can be adapted"),
    (["meta", "chat.jsonl", "--quantize", "int8"], "blocks.0.attention.wq.values holds integers: quantized weights"),
    (["meta", "chat.jsonl", "--adapter", "nowhere"], "nowhere"),
    (["meta", "chat.jsonl", "--resume"], "tuned: there is no run to go on with"),
    (["meta", "chat.jsonl", "--steps", "5", "--warmup", "5"], "warmup_cosine: warmup (5) must lie in [0, steps)"),
    (["meta", "chat.jsonl", "--beta", "0"], "beta must lie in (0, inf), got 0.0"),
    (["meta", "chat.jsonl", "--evaluate-every", "0"], "evaluate_every must be at least 1, got 0"),
    (["meta", "two", "--each"], "only adapters are trained side by side: give their --rank"),
])
def test_bad_input_is_one_line_and_nothing_is_written(place, monkeypatch, capsys, args, message):
    (place / "two").mkdir()
    for name in ("one", "other"):
        (place / "two" / f"{name}.jsonl").write_text((place / "chat.jsonl").read_text())
    status, out, err = cli(monkeypatch, capsys, "finetune", *args, "--out", "tuned")
    lines = [line for line in err.splitlines() if line.startswith("llama-fn: ")]
    assert (status, out) == (2, "") and lines[-1].startswith(f"llama-fn: {message}"), err
    assert not (place / "tuned").exists()
