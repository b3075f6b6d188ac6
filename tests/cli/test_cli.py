"""The command line: what it prints where, its exit status, and one line for every error."""

import itertools
import os
import re
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from program import COMMAND, cli

import llama_fn as lf
from llama_fn.cli.main import COMMANDS


def start(*args: str, **pipes) -> subprocess.Popen:
    return subprocess.Popen([*COMMAND, *args], text=True, **pipes)


def test_generate_prints_the_story_and_on_standard_error_the_speed(monkeypatch, capsys):
    status, out, err = cli(monkeypatch, capsys, "generate", "Long ago", "--seed", "3", "--max-new-tokens", "12")
    expected, = lf.text_completion(lf.load("stories"), ["Long ago"], key=lf.random.key(3), max_new_tokens=12, echo=True,
                                   sampler=lf.sampler(0.8))
    assert status == 0 and out == expected.text + "\n"
    assert err.startswith("[seed 3: ") and err.endswith(" tokens a second]\n") and err.count("\n") == 1


def test_the_version_is_told_and_is_the_packages(monkeypatch, capsys):
    for flag in ("--version", "-V"):
        assert cli(monkeypatch, capsys, flag) == (0, f"llama-fn {lf.__version__}\n", "")
    settings = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "llama_fn.__version__"}


def test_short_flags_are_the_long_ones(monkeypatch, capsys):
    own = ["generate", "Long ago", "--seed", "3"]
    (_, short, told), (_, long, _) = (cli(monkeypatch, capsys, *own, flag, "5") for flag in ("-n", "--max-new-tokens"))
    assert short == long and ": 5 tokens in " in told
    prompt = len(lf.load("stories").tokenizer.encode("Long ago"))
    for flag in ("-c", "--context"):  # prompt and text together
        assert f": {12 - prompt} tokens in " in cli(monkeypatch, capsys, *own, flag, "12")[2]


@pytest.mark.slow
def test_without_a_seed_every_story_is_another(monkeypatch, capsys):
    stories = {cli(monkeypatch, capsys, "generate", "", "--temperature", "1")[1] for _ in range(2)}
    assert len(stories) == 2


@pytest.mark.slow
def test_greedy_is_greedy(monkeypatch, capsys):
    texts = {cli(monkeypatch, capsys, "generate", "--greedy", "--seed", seed)[1] for seed in "12"}
    assert len(texts) == 1


@pytest.mark.slow
def test_a_draft_changes_the_speed_and_not_the_text(monkeypatch, capsys):
    plain, *drafted = (cli(monkeypatch, capsys, "generate", "--greedy", "--seed", "1", "--max-new-tokens", "40", *more)
                       for more in ([], ["--draft", "stories-draft", "--speculate", "3"], ["--draft", "stories"]))
    assert [out for _, out, _ in drafted] == [plain[1]] * 2
    for (status, _, err), n in zip(drafted, (3, 4), strict=True):
        found = re.fullmatch(r"\[seed 1: 40 tokens .* tokens a second; (\d+) of (\d+) drafted tokens accepted\]\n", err)
        accepted, proposed = map(int, found.groups())
        assert status == 0 and proposed % n == 0 and 10 < accepted <= proposed
    assert accepted == proposed == 32  # of a draft that is the model itself; 8 rounds and the first token are 41


def test_stop_and_empty_prompt(monkeypatch, capsys):
    status, out, _ = cli(monkeypatch, capsys, "generate", "--seed", "1", "--stop", ".", "--stop", "lived", "")
    assert status == 0 and len(out) > 20 and "." not in out


@pytest.mark.parametrize(("args", "message"), [
    (["generate", "--model", "nowhere"], "llama-fn: nowhere: no model there: expected the name of an embedded model "),
    (["generate", "--top-p", "2"], "llama-fn: sampler: top_p must lie in (0, 1], got 2.0"),
    (["generate", "--seed", "-1"], "llama-fn: random.key: a seed lies in [0, 2**64), got -1"),
    (["generate", "word " * 300], "llama-fn: the prompt has "),
    (["generate", "a\ud800"], "llama-fn: the text is not valid Unicode: character 1 is the lone surrogate U+D800"),
    (["generate", "--max-new-tokens", "-3"], "llama-fn: max_new_tokens must be at least 0, got -3"),
    (["generate", "-n", "-3"], "llama-fn: max_new_tokens must be at least 0, got -3"),
    (["generate", "-c", "1"], "llama-fn: --context must lie in [2, 256], the context that the model was trained for"),
    (["generate", "-c", "257"], "llama-fn: --context must lie in [2, 256], "),
    (["generate", "word " * 9, "-c", "8"], "llama-fn: the prompt has "),
    (["generate", "--draft", "nowhere"], "llama-fn: nowhere: no model there"),
    (["generate", "--draft", "stories", "--speculate", "0"], "llama-fn: n must be at least 1 proposed token a round"),
    (["generate", "--stop", ""], "llama-fn: a stop string is empty"),
    (["generate", "--device", "warp"], "llama-fn: --device warp: "),
    (["generate", "--device", "meta"], "llama-fn: --device meta: "),
    (["evaluate", "--count", "0"], "llama-fn: count and batch must be at least 1, got 0 and 50"),
    (["train", "--micro-batches", "0"], "llama-fn: micro_batches must be at least 1, got 0"),
    (["train", "--clip", "-1"], "llama-fn: clip must lie in (0, inf), got -1.0"),
    (["train", "--weight-decay", "nan"], "llama-fn: weight_decay must lie in [0, inf), got nan"),
    (["train", "--final-learning-rate", "-1"], "llama-fn: final_learning_rate must lie in [0, inf), got -1.0"),
    (["train", "--evaluate-every", "0"], "llama-fn: evaluate_every must be at least 1, got 0"),
    (["train", "--vocab-size", "9", "--stories", "30"], "llama-fn: no tokenizer of 9 tokens can be learned"),
    (["tokenizer", "nowhere.txt"], "llama-fn: nowhere.txt: no such file or folder"),
    (["train", "nowhere.txt"], "llama-fn: nowhere.txt: no such file or folder"),
    (["train", "--n-heads", "5", "--n-kv-heads", "2"], "llama-fn: Config: n_heads (5) must be a multiple of n_kv"),
    (["train", "--warmup", "9", "--steps", "9"], "llama-fn: warmup_cosine: warmup (9) must lie in [0, steps)"),
    (["train", "--resume"], "llama-fn: run: there is no run to go on with"),
    (["evaluate", "nowhere"], "llama-fn: nowhere: no model there"),
])
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = cli(monkeypatch, capsys, *args)
    lines = [line for line in err.splitlines() if line.startswith("llama-fn")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith(message), err
    assert "Traceback" not in err and out.strip() in ("", " ".join(args[1:2]).strip())
    assert not list(tmp_path.iterdir())  # nothing was written


@pytest.mark.parametrize("args, words", [
    (["generate", "--temperature", "hot"], ["--temperature", "'hot'"]),
    (["generate", "--temp", "1"], ["--temp,", "--temperature"]),
    (["generate", "--seed", "9" * 5000], ["--seed", "4300 digits"]),
    (["generate", "--dtype", "float8"], ["'float8'", "--dtype", "bfloat16"]),
    (["generate", "--model"], ["--model"]), (["generate", "a", "b"], ["b"]),
    (["paint"], ["paint", "generate, chat"]), ([], ["generate, chat"]), (["chat"], ["MODEL"]), (["choose"], ["PROMPT"]),
    (["convert", "a"], ["DST", "--to"]), (["train", "--dim", "1.5"], ["--dim", "'1.5'"])])
def test_arguments_that_are_none_are_one_line_and_status_2(monkeypatch, capsys, args, words):
    status, out, err = cli(monkeypatch, capsys, *args)
    assert (status, out) == (2, "") and err.startswith("llama-fn: ") and err.endswith(" --help\n")
    assert err.count("\n") == 1 and all(word in err for word in words) and not set(err) & {"│", "─", "╭"}
    assert "---" not in err  # of a box without a terminal


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
def test_help_goes_to_standard_output(monkeypatch, capsys, command):
    status, out, err = cli(monkeypatch, capsys, *command, "--help")
    assert (status, err) == (0, "") and out.startswith(f"usage: {' '.join(['llama-fn', *command])} ")


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_each_option_has_a_text_and_no_line_of_it_ends_before_it_is_full(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = cli(monkeypatch, capsys, command, "--help")
    lines = [line for row in out.splitlines() if (line := row.replace("│", " ").rstrip()).startswith("  ")]
    _, *options = re.split(r"\n  (?=--?[a-z])", "\n".join(lines))
    assert len(options) > 20
    for option in options:
        name, *words = re.sub(r"\(default:[^)]*\)", "", option).split()
        assert any(word.islower() and word[0].isalpha() for word in words), name
    for line, after in itertools.pairwise(lines):
        if line.startswith(" " * 16) and after.startswith(" " * 16):
            assert len(line) + 1 + len(after.split()[0]) > 97, line


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nto"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("a bug")])
def test_too_little_memory_is_one_line_and_a_mistake_of_the_program_is_none(monkeypatch, capsys, error):
    def fails(*args, **named):
        raise error

    monkeypatch.setattr("llama_fn.cli.generate.model_of", fails)
    if "bug" in str(error):
        with pytest.raises(RuntimeError, match="a bug"):
            cli(monkeypatch, capsys, "generate")
    else:
        status, _, err = cli(monkeypatch, capsys, "generate")
        assert status == 2 and err.startswith("llama-fn: there is not enough memory for this") and err.count("\n") == 1


@pytest.mark.parametrize("args", [["-c", "0"], ["--stride", "0"]])
def test_an_error_comes_without_a_progress_bar(monkeypatch, capsys, tmp_path, args):
    (tmp_path / "a.txt").write_text("Once upon a time")
    status, _, err = cli(monkeypatch, capsys, "perplexity", str(tmp_path / "a.txt"), *args)
    assert status == 2 and err.startswith("llama-fn: ") and err.count("\n") == 1


def test_tokenizer_learns_and_does_not_write_over(monkeypatch, capsys, tmp_path, texts):
    (tmp_path / "text.txt").write_text("\n".join(texts))
    args = ["tokenizer", str(tmp_path / "text.txt"), "--vocab-size", "333", "--out", str(tmp_path / "t.model")]
    assert cli(monkeypatch, capsys, *args)[:2] == (0, f"{tmp_path / 't.model'}: 333 tokens\n")
    assert lf.load_tokenizer(tmp_path / "t.model").vocab_size == 333
    status, _, err = cli(monkeypatch, capsys, *args)
    assert status == 2 and "exists; choose another --out, or replace it with --force" in err
    assert cli(monkeypatch, capsys, *args, "--force")[0] == 0


@pytest.mark.slow
def test_evaluate_measures_the_shipped_model(monkeypatch, capsys):
    status, out, _ = cli(monkeypatch, capsys, "evaluate", "--count", "30")
    assert status == 0
    numbers = {line.split()[0]: float(line.split()[1].rstrip("%")) for line in out.splitlines() if line[0] != "a"}
    assert numbers["floor"] < numbers["loss"] < numbers["floor"] * 1.04  # 30 stories: within 2 points of the card
    assert numbers["derivable"] >= 80


@pytest.mark.slow
def test_generate_works_in_a_pipe_and_reads_one():
    for text in ("Once upon a time", "Once upon a time\n"):  # echo's newline is not part of the text
        done = subprocess.run([*COMMAND, "generate", "-", "--seed", "0", "--max-new-tokens", "5"], input=text,
                              capture_output=True, text=True, check=True)
        assert done.stdout.startswith("Once upon a time there was") and "[seed 0: 5 tokens in" in done.stderr
    empty = subprocess.run([*COMMAND, "generate", "-"], input="", capture_output=True, text=True, check=False)
    assert empty.returncode == 2
    assert empty.stderr == "llama-fn: the prompt is empty: standard input holds no text\n"
    bad = subprocess.run([*COMMAND, "generate", "-"], input=b"caf\xe9", capture_output=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr == b"llama-fn: standard input: not UTF-8: byte 0xE9 at offset 3; convert it to UTF-8 first\n"


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error():
    with start("generate", "--seed", "0", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(5)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0 and "Traceback" not in err and "Exception" not in err


@pytest.mark.slow
def test_ctrl_c_stops_cleanly():
    with start("generate", "--seed", "0", "--temperature", "1", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
               env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout.read(20) == "Once upon a time the"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith("\n") and err.startswith("[seed 0: ") and "Traceback" not in err


@pytest.mark.slow
def test_train_shows_progress_and_its_model_tells_a_story(monkeypatch, capsys, tmp_path):
    sizes = ["--dim", "48", "--n-layers", "1", "--hidden-dim", "70", "--vocab-size", "330", "--context", "40",
             "--steps", "4", "--batch", "5", "--warmup", "1", "--stories", "60", "--evaluate-every", "4"]
    done = subprocess.run([*COMMAND, "train", "--out", "teller", *sizes], capture_output=True, text=True, check=True,
                          cwd=tmp_path)
    assert "tokens to learn from; the first step compiles" in done.stderr and "step 4: validation loss" in done.stderr
    assert "(floor " in done.stderr and "loss " in done.stderr and " tokens/s" in done.stderr
    assert done.stdout.strip()
    assert {"params.json", "consolidated.00.pth", "tokenizer.model", "metrics.jsonl", "curves.png", "snapshots",
            "run.json", "data"} == {p.name for p in (tmp_path / "teller").iterdir()}
    monkeypatch.chdir(tmp_path)
    status, story, _ = cli(monkeypatch, capsys, "generate", "--model", "teller", "--seed", "1")
    assert status == 0 and story.startswith("Once upon a time")


@pytest.mark.slow
def test_help_names_every_command():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("generate", "train", "tokenizer", "evaluate"))
