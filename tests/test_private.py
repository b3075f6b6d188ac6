"""Torch's private names stand in two files, and what is public stands in for those that a torch does not have."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from strategies import random_params, token_rows

import llama_fn as lf
from llama_fn import modes, private, private_inductor
from llama_fn.ops.cpu import build

PACKAGE = Path(lf.__file__).parent
CONFIG = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)


def private_names(source: str) -> list[str]:
    """Names with an underscore that are reached through torch, or are attributes of what is not the file's own."""
    module = ast.parse(source)
    own = {n.name for n in ast.walk(module) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(module) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
            and isinstance(n.value, ast.Name) and n.value.id == "self"}
    own |= {"_replace", "_fields", "_asdict", "_make"}  # of NamedTuples
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            parts = [part for alias in node.names for part in f"{getattr(node, 'module', '')}.{alias.name}".split(".")]
            found += [part for part in parts if part.startswith("_") and "torch" in parts]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found += [node.attr] if node.attr not in own else []
    return found


def test_no_other_file_uses_a_private_name_of_torch():
    found = {str(path.relative_to(PACKAGE)): names for path in sorted(PACKAGE.rglob("*.py"))
             if (names := private_names(path.read_text()))}
    assert len(found.pop("private.py") + found.pop("private_inductor.py")) > 20
    assert found.pop("tree.py") == ["_pytree"]
    assert not found


@pytest.mark.parametrize("line", [
    "import torch._C", "from torch._C import _functorch", "from torch.utils import _pytree",
    "torch._C._get_dispatch_mode()", "forward_ad._current_level", "f._marked = True"])
def test_a_private_name_is_seen_however_it_is_reached(line):
    assert private_names(line)


@pytest.mark.slow
def test_to_import_the_package_imports_no_compiler():
    code = ("import sys, llama_fn; print([name for name in ('torch._dynamo', 'torch._inductor.compile_fx', 'triton') "
            "if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not build.vector_instructions(), reason="needs a processor that our C++ kernels run on")
def test_a_step_that_runs_in_one_kernel_waits_for_no_import_of_the_compiler():
    code = ("import sys, torch, llama_fn as lf; params = lf.load('stories').params; "
            "lf.jit_layers()(params, torch.zeros(1, dtype=int), lf.init_cache(params.config, max_len=40)); "
            "print('torch._inductor.compile_fx' in sys.modules, 'torch._inductor.codecache' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr


@pytest.mark.slow
def test_this_torch_has_all_of_these_names():
    assert private.MISSING == []
    assert all(vars(private_inductor.inductor()).values())


def test_a_torch_without_these_names_computes_the_same(monkeypatch):
    """As a new torch would be: without the names that eager code asks for; a transform is told by its tensors."""
    params, tokens = random_params(CONFIG, lf.random.key(0), torch.float32), token_rows(CONFIG, 3, 5)

    def results():
        logits, cache = lf.forward(params, tokens, lf.init_cache(CONFIG, (3,), max_len=6))
        return logits, cache, torch.func.grad(lf.loss)(params, tokens)

    expected = results()
    for name, value in (("_interpreters", lambda: None), ("_dispatch_mode", lambda key: None), ("_proxy", None)):
        monkeypatch.setattr(private, name, value)
    monkeypatch.setattr(modes, "is_wrapped", lambda x: type(x) is not torch.Tensor)
    for x, y in zip(lf.tree.leaves(results()), lf.tree.leaves(expected), strict=True):
        assert (x - y).abs().max() < 1e-5
    monkeypatch.setattr(private, "MISSING", [])
    assert private._found("torch._nowhere", "name", 5) == private._found("torch", "_no.name", 5) == 5
    assert private.MISSING == ["torch._nowhere.name", "torch._no.name"]


def test_without_the_compilers_names_all_runs_as_it_is(monkeypatch):
    def gone():
        raise ImportError("cannot import name 'x'")

    monkeypatch.setattr(private_inductor, "inductor", gone)
    assert private_inductor.lacking() is None or not torch.__version__.startswith(private_inductor.KNOWN)
    monkeypatch.setattr(private_inductor, "KNOWN", ())
    with pytest.warns(UserWarning, match=r"torch .* was not written for .*forward runs as it is"):
        assert lf.jit_layers() is lf.forward
