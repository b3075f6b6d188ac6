"""Every document is true: its Python blocks run as printed and in order, its commands run or parse, its links lead
somewhere, and every public name is used in a block, a command's page or an example.
"""

import io
import json
import re
import shlex
import sys
from functools import wraps
from pathlib import Path

import pytest
import torch.distributed as dist
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

import llama_fn as lf
from llama_fn.cli import main as program
from llama_fn.training import loop
from llama_fn.training.step import make_step

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.md")
                   if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))

# What no test runs as printed, and where it is run instead.
ELSEWHERE = {
    "python3 -m venv": "CI, from a clean clone",
    "docker ": "an engine of Docker is needed",
    "pytest": "this is pytest",
    "python examples/": "test_examples.py and its neighbors",
    "python -m tests": "by hand",
    "torchrun ": "test_mesh_example.py and tests/mesh",
    "python tests/plant.py": "test_planted.py",
}
# Commands that take long: their arguments are parsed, and the work is not done. So are those on several devices.
PARSED = ("llama-fn bench", "llama-fn train --out", "llama-fn report adamw", "llama-fn evaluate")  # train without texts
# Commands that end when their input does, or that a few more arguments make short.
SHORTER = {"llama-fn train my-texts/": ["--dim", "48", "--n-layers", "1", "--hidden-dim", "70", "--context", "40",
                                        "--batch", "5", "--vocab-size", "333"],
           "llama-fn finetune": ["--steps", "1", "--batch", "1", "--context", "40"]}
STEPS = {"2000": "3"}  # of training, and of that alone


@pytest.fixture
def place(tmp_path, monkeypatch, model, texts) -> Path:
    """The folder in which a reader of the documents would be: it holds the weights and texts that they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "jit_step", make_step)  # a training step compiles for 15 s, and is tested elsewhere
    for folder in ("llama-2-7b", "llama-2-7b-chat"):
        lf.save(model, folder)
    (tmp_path / "book.txt").write_text(" ".join(texts[:3]))
    (tmp_path / "my-texts").mkdir()
    (tmp_path / "my-texts" / "stories.txt").write_text("\n".join(texts))
    dialog = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": dialog}))
    (tmp_path / "preferences.jsonl").write_text(json.dumps({"prompt": "Once", "chosen": " a fox", "rejected": "!"}))
    (tmp_path / "my-answers").mkdir()
    for name in ("one", "two"):
        (tmp_path / "my-answers" / f"{name}.jsonl").write_text(json.dumps({"prompt": "Who?", "completion": " A fox."}))
    adapter = lf.lora.init(lf.random.key(0), model.params, rank=2)
    lf.lora.save(adapter, "my-lora", model.params)
    return tmp_path


def run_command(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Run a line of `llama-fn` in this process, what comes before a pipe as its input; it must end well."""
    before, pipe, after = line.rpartition(" | ")
    words = shlex.split(after, comments=True)
    text = " ".join(shlex.split(before)[1:]) if pipe else ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    for beginning, more in SHORTER.items():
        if line.startswith(beginning):
            words = [STEPS.get(word, word) for word in words] + more
    monkeypatch.setattr(sys, "argv", words)
    if line.startswith(PARSED) or " --mesh " in line:
        monkeypatch.setattr(program, "COMMANDS", {name: _parsed(f) for name, f in program.COMMANDS.items()})
    try:
        program.main()
    except SystemExit as end:
        assert not end.code, f"{line}\n{capsys.readouterr().err}"


def _parsed(command):
    @wraps(command)
    def parsed(*args, **kwargs) -> None:
        pass

    return parsed


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_and_command_runs_in_order(name, place, monkeypatch, capsys):
    def commands(example: Example) -> None:
        for line in example.parsed.splitlines():
            if line.strip() and not line.lstrip().startswith("#") and not line.startswith(tuple(ELSEWHERE)):
                line = re.sub(r"^torchrun .* -m llama_fn ", "llama-fn ", line)
                assert line.rpartition(" | ")[2].startswith("llama-fn "), f"{name}: who runs {line!r}?"
                with monkeypatch.context() as own:
                    run_command(line, own, capsys)

    document = Sybil([PythonCodeBlockParser(), CodeBlockParser("sh", commands)]).parse(ROOT / name)
    try:
        for example in document.examples():
            example.evaluate()
    finally:
        if dist.is_initialized():  # a mesh of this process alone
            dist.destroy_process_group()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    text = (ROOT / name).read_text()
    text = re.sub(r"`[^`\n]*`", "", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert not [link for link in links if not ((ROOT / name).parent / link).exists()]


def test_every_public_name_is_used_in_a_document_or_an_example():
    pages = [(ROOT / name).read_text() for name in DOCUMENTS]
    pages += [path.read_text() for path in (ROOT / "examples").glob("*.py")]
    used = set(re.findall(r"\blf\.(\w+)", "\n".join(pages)))
    assert set(lf.__all__) - used == set()


def test_the_front_door_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
