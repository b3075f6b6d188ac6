"""Every example runs."""

import re
import runpy
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from example import run

import llama_fn as lf
from llama_fn.training import loop
from llama_fn.training.data import rows
from llama_fn.training.plan import Plan
from llama_fn.training.run import run as run_plan
from llama_fn.training.step import make_step

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_generate_tells_the_same_story_three_ways():
    done = subprocess.run([sys.executable, "-W", "error", ROOT / "examples" / "generate.py", "Many years ago"],
                          capture_output=True, text=True, check=True)  # in a process that has imported nothing yet
    stories = done.stdout.strip().split("\n\n")
    assert len(stories) == 3 and len(set(stories)) == 1 and stories[0].startswith("Many years ago there was a")


@pytest.mark.slow
def test_vmap_prompts(capsys):
    out = run("vmap_prompts", capsys)
    assert "named Lily.  ->' She'" in out and "named Tom.  ->' He'" in out
    she, _, he = (float(x) for x in re.findall(r"log p = +(-[\d.]+)", out))
    assert she > he + 5  # Lily is she
    assert "1000 draws" in out and "an ensemble's probabilities" in out


@pytest.mark.slow
def test_finetune_teaches_a_name(capsys):
    out = run("finetune", capsys)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < 0.7 * losses[0]
    before, after = out.split("before: ")[1].split("after: ")
    assert "named Ada" not in before and "named Ada" in after


@pytest.mark.slow
def test_finetune_chat_teaches_an_answer_and_a_preference(tmp_path, capsys):
    out = run("finetune_chat", capsys, str(tmp_path / "adapter"))
    chats, preferences = ([float(x) for x in re.findall(rf"{what}, step +\d+: loss ([\d.]+)", out)]
                          for what in ("chats", "preferences"))
    assert chats[-1] < 0.1 * chats[0] and "is a brave little girl." in out
    assert preferences[0] == pytest.approx(0.693, abs=1e-3) and preferences[-1] < 0.5 * preferences[0]
    before, after = (float(x) for x in re.findall(r"log p\(chosen\) - log p\(rejected\) = (-?[\d.]+)", out))
    assert after > before + 5
    params, _ = lf.load("stories")
    assert len(lf.lora.load(tmp_path / "adapter", params).matrices) == 7 * params.config.n_layers


@pytest.mark.slow
def test_dp_sgd_learns_from_noisy_sums(capsys):
    out = run("dp_sgd", capsys, "8")
    first, last = (float(x) for x in re.findall(r"loss of others ([\d.]+)", out))
    assert last < 0.9 * first
    assert "before: Long ago" in out and "after: Long ago" in out


@pytest.mark.slow
def test_lora_teaches_each_row_its_name(tmp_path, capsys):
    out = run("lora", capsys, str(tmp_path))
    first, *_, last = re.findall(r"losses ([\d.]+) ([\d.]+) ([\d.]+)", out)
    assert all(float(b) < 0.97 * float(a) for a, b in zip(first, last, strict=True))
    for name in ("Rosa", "Ruby", "Zoe"):
        assert f"{name}: Long ago there was a brave little girl named {name}" in out
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == ["adapter_config.json",
                                                                             "adapter_model.safetensors"]
    assert out.split("Rosa: ")[1].split("\n")[0] == out.split("Rosa, merged: ")[1].split("\n")[0]


@pytest.mark.slow
def test_train_is_the_run_of_the_command_line_bit_for_bit(tmp_path, monkeypatch, capsys):
    # Uncompiled, in this process: what compiles is tested elsewhere, and takes a minute each time.
    monkeypatch.setattr(loop, "jit_step", make_step)
    monkeypatch.setattr(sys.modules["llama_fn.training.jit_step"], "jit_step", make_step)
    monkeypatch.setattr(loop, "rows", lambda corpus, size: islice(rows(corpus, size), 1))  # evaluated on 32 rows
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "page"), "2", "400"])
    runpy.run_path(str(ROOT / "examples" / "train.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "the grammar's entropy is 0.288" in out and "Once upon a time" in out
    command = run_plan(tmp_path / "command", Plan(steps=2, warmup=0, stories=400))
    page = lf.load(tmp_path / "page")
    assert page.tokenizer == command.tokenizer
    assert all(map(torch.equal, lf.tree.leaves(page.params), lf.tree.leaves(command.params)))


def test_characters_learns_the_letters_of_a_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["llama_fn.training.jit_step"], "jit_step", make_step)
    monkeypatch.setattr(lf, "keep_memory", lambda: True)  # it would change this process to its end
    (tmp_path / "text").write_text("the cat sat on the mat, and the dog ran to the cat. " * 200)
    (loss, size), = re.findall(r"validation loss ([\d.]+) \(([\d,]+) parameters\)",
                               run("characters", capsys, str(tmp_path / "text"), "1", "9"))
    assert float(loss) < 2 and size == "795,520"  # uniform, it would be 2.8


@pytest.mark.parametrize("shards", ["1", "2"])
def test_seven_billion_makes_opens_and_decodes(tmp_path, monkeypatch, capsys, shards):
    small = lf.Config(dim=48, n_layers=3, n_heads=8, n_kv_heads=4, vocab_size=90, hidden_dim=70)
    monkeypatch.setattr(lf, "LLAMA2_7B", small)
    for args in (["make", str(tmp_path / "7b"), shards], ["open", str(tmp_path / "7b"), "3"]):
        monkeypatch.setattr(sys, "argv", ["seven_billion.py", *args])
        runpy.run_path(str(ROOT / "examples" / "seven_billion.py"), run_name="__main__")
    assert len(list((tmp_path / "7b").glob("consolidated.*.pth"))) == int(shards)
    out = capsys.readouterr().out
    assert "opened " in out and "median of 2" in out and "GiB resident" in out


def test_quantize_tells_what_bits_cost(tmp_path, monkeypatch, capsys, texts):
    (tmp_path / "stories.txt").write_text("\n".join(texts[:3]))
    monkeypatch.setattr(sys, "argv", ["quantize.py", "stories", str(tmp_path / "stories.txt")])
    runpy.run_path(str(ROOT / "examples" / "quantize.py"), run_name="__main__")
    _, *rows, last = capsys.readouterr().out.splitlines()
    names, largest, mean, bits, perplexity, size = zip(*(row.split() for row in rows), strict=True)
    assert names == ("float32", "int8", "int4") and largest[0] == mean[0] == "0.0000"
    assert 0 < float(mean[1]) < float(mean[2]) / 5 and float(mean[2]) < float(largest[2])
    assert 1 <= float(perplexity[0]) < 1.02 * float(perplexity[1]) and float(bits[2]) < 1.3 * float(bits[0])
    assert size == ("3,839,040", "1,426,752", "1,065,024")
    assert f"bits a byte of {(tmp_path / 'stories.txt').stat().st_size:,} bytes" in last


def test_the_readme_and_ci_run_the_same_tests():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    line = next(line for line in readme.splitlines() if "pytest" in line)
    assert line.startswith("python3 -m venv") and line.endswith("pytest")
    assert "grep -m1 'pytest' README.md" in ci and 'eval "$line"' in ci
    story = next(line for line in readme.splitlines() if line.endswith('llama-fn generate "Once upon a time"'))
    assert story.startswith("python3 -m venv")
    pinned = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    needed = (ROOT / "pyproject.toml").read_text().split("[project.opt")[0]
    names = re.findall(r'^    "([a-z_]+)[>=]', needed, re.MULTILINE)
    assert sorted(pinned) == sorted(names)
