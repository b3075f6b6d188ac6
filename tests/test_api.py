"""The page of the public names: it names each, explains it with a line that runs, and refers to what exists."""

import dataclasses
import doctest
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import llama_fn as lf

DOCS = Path(__file__).parent.parent / "docs"
MODULES = ("tree", "random", "optim", "lora", "stories", "mesh")
NAMES = [*(name for name in lf.__all__ if name not in MODULES),
         *(f"{module}.{name}" for module in MODULES for name in getattr(lf, module).__all__)]
# Neither functions nor types: Python gives them no docstring.
DATA = {"LLAMA2_7B", "LLAMA2_13B", "LLAMA2_70B", "lora.LINEAR", "mesh.PRESETS", "mesh.Plan"}


def thing(name: str) -> Any:
    found: Any = lf
    for part in name.split("."):
        found = getattr(found, part)
    return found


def build(source: Path, out: Path) -> subprocess.CompletedProcess:
    """Build a page by the settings of `docs`."""
    return subprocess.run([sys.executable, "-m", "sphinx", "-nWq", "--keep-going", "-c", DOCS, source, out],
                          capture_output=True, text=True, check=False)


def test_the_page_has_each_public_name_once():
    text = (DOCS / "index.rst").read_text()
    listed = re.findall(r"^\.\. (?:auto\w+|py:data):: (?:llama_fn\.)?(\S+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(NAMES)
    assert all(isinstance(getattr(lf, module), ModuleType) for module in MODULES)


@pytest.mark.slow
def test_the_page_is_built_and_every_reference_leads_somewhere(tmp_path):
    done = build(DOCS, tmp_path / "page")
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "page" / "index.html").read_text()
    assert all(f'id="llama_fn.{name}"' in page for name in NAMES)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "index.rst").write_text("Page\n====\n`llama_fn.fourward`\n")
    done = build(broken, tmp_path / "broken page")
    assert done.returncode == 1 and "reference target not found: llama_fn.fourward" in done.stderr


@pytest.fixture(scope="module")
def around(tmp_path_factory) -> dict[str, Any]:
    """The names that the lines of use begin with."""
    model = lf.load("stories")
    params, tokenizer = model
    key, tokens = lf.random.key(0), torch.tensor(tokenizer.encode("Once upon a time"))
    cache = lf.init_cache(params.config, max_len=64)
    dialog = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}]
    prompt = {"key": key, "max_new_tokens": 4}
    return {"lf": lf, "torch": torch, "dataclasses": dataclasses, "Tensor": Tensor, "Float": Float,
            "model": model, "params": params, "tokenizer": tokenizer, "config": params.config, "key": key,
            "tokens": tokens, "batch": tokens.repeat(2, 1), "cache": cache, "dialog": dialog,
            "logits": lf.forward(params, tokens)[0][-1], "x": lf.trunk(params, tokens)[0], "again": params,
            "branches": lf.fork(lf.forward(params, tokens, cache)[1], (8,), max_len=64), "grads": params,
            "adapter": lf.lora.init(key, params, 2, ["wq"]), "optimizer": lf.optim.adamw(1e-3),
            "chosen": (tokens, torch.ones_like(tokens, dtype=torch.bool)), "reference": params,
            "rejected": (tokens.flip(0), torch.ones_like(tokens, dtype=torch.bool)),
            "rows": lf.generate(params, tokens[None], **prompt),
            "completions": lf.text_completion(model, ["Once"], **prompt),
            "drafted": lf.speculate(model, model, ["Once"], **prompt),
            "texts": [lf.stories.story(each) for each in lf.random.split(key, 40)]}


@pytest.fixture
def place(around, tmp_path, monkeypatch) -> dict[str, Any]:
    """The same, in a folder with the files that the lines read."""
    monkeypatch.chdir(tmp_path)
    lf.lora.save(around["adapter"], "my-lora", around["params"])
    shutil.copytree(Path(lf.stories.__file__).parent / "model", "my-model")
    lf.save(around["model"], "my-hf", format="hf")
    return around | {"hf_config": json.loads(Path("my-hf/config.json").read_text())}


@pytest.fixture
def four_processes(place) -> Iterator[dict[str, Any]]:
    """The names of one of four processes, of which the other three are not there: nothing is sent or awaited."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    mesh = lf.mesh.make_mesh({"dp": 2, "tp": 2})
    parts, rows = (lf.mesh.shard(place[name], mesh, "fsdp+tensor") for name in ("params", "batch"))
    yield place | {"mesh": mesh, "params": parts, "rows": rows}
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DATA and not name.startswith("mesh.")])
def test_every_public_name_is_explained_with_a_line_that_runs(place, name):
    check_lines(place, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DATA and name.startswith("mesh.")])
def test_every_name_of_the_mesh_is_explained_with_a_line_that_runs(four_processes, name):
    divides = name == "mesh.shard"  # of parameters that are whole
    check_lines(four_processes | ({"params": lf.load("stories").params} if divides else {}), name)


def check_lines(place: dict[str, Any], name: str) -> None:
    text = inspect.getdoc(thing(name))
    assert text and re.match(r"[^\n]+\.(\n\n|$)", text), "a summary of one line, with a period"
    lines = doctest.DocTestParser().get_examples(text)
    assert lines, "no line of use"
    named = any(re.search(rf"\b{re.escape(name.split('.')[-1])}\b", line.source) for line in lines)
    assert named or inspect.isclass(thing(name))  # a type may be what a function gives
    for line in lines:
        exec(line.source, place)
