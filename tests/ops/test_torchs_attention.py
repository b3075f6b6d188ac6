"""Torch's own attention is what it is without this package: the same results, and the same errors."""

import subprocess
import sys

import pytest

WITHOUT = """
import warnings
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vjp

torch.manual_seed(0)
q, k, v, u = torch.randn(4, 3, 2, 4, 5, 6)
attend = F.scaled_dot_product_attention
WAYS = {
    "value": lambda: attend(q[0], k[0], v[0]),
    "vmap": lambda: torch.vmap(attend)(q, k, v),
    "grad": lambda: grad(lambda q: attend(q, k[0], v[0]).sin().sum())(q[0]),
    "vmap(grad)": lambda: torch.vmap(grad(lambda q, k, v: attend(q, k, v).sin().sum()))(q, k, v),
    "jvp": lambda: jvp(lambda q: attend(q, k[0], v[0]), (q[0],), (u[0],))[1],
    "jvp(grad)": lambda: jvp(grad(lambda q: attend(q, k[0], v[0]).sin().sum()), (q[0],), (u[0],))[1],
    "vjp(vjp)": lambda: vjp(vjp(lambda q: attend(q, k[0], v[0]), q[0])[1], u[0])[1]((u[0],)),
    "twice": lambda: twice(q[0].clone().requires_grad_()),
}


def twice(x):
    slope, = torch.autograd.grad(attend(x, k[0], v[0]).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(slope.sin().sum(), x)


def seen():
    lines = []
    for name, way in WAYS.items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                result = way()
                result = [x.tolist() for x in (result if isinstance(result, tuple) else (result,))]
            except Exception as error:
                result = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        slow = any("performance drop" in str(w.message) for w in warned)
        lines.append(f"{name}: {'once for each example' if slow else ''} {result}")
    return "\\n".join(lines)
"""
WITH = """
import llama_fn as lf

before = seen()
config = lf.Config(dim=24, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=77, hidden_dim=34)
params, tokens = lf.init_params(lf.random.key(0), config), torch.arange(10).reshape(2, 5)
torch.vmap(grad(lf.loss), (None, 0))(params, tokens)
jvp(lambda params: grad(lf.loss)(params, tokens), (params,), (params,))
tracked = lf.tree.map(lambda x: x.clone().requires_grad_(), params)
slopes = torch.autograd.grad(lf.loss(tracked, tokens), lf.tree.leaves(tracked), create_graph=True)
torch.autograd.grad(sum(x.sum() for x in slopes), lf.tree.leaves(tracked))
print(before)
print(seen())
"""


@pytest.mark.slow
def test_torchs_attention_is_the_same_without_this_package_beside_it_and_after_its_transforms():
    alone, beside = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
                     for code in (WITHOUT + "print(seen())", WITHOUT + WITH))
    assert alone.returncode == 0 and beside.returncode == 0, alone.stderr + beside.stderr
    lines = alone.stdout.splitlines()
    assert len(lines) == 8 and all("once for each example" in lines[i] for i in (1, 3))
    assert all("RuntimeError" in line or "NotImplementedError" in line for line in lines[-4:])
    assert beside.stdout.splitlines() == 2 * lines
