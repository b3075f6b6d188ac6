"""The loss in chunks of tokens is its definition, under every transform, and takes a fraction of the memory."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numerics import close, direction_like
from strategies import keys, models, random_params, token_rows
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fn as lf
from llama_fn.training import chunked_loss
from llama_fn.training.loss import cross_entropy

CONFIG = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70)


@contextlib.contextmanager
def logits_at_once(most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "LOGITS", most)
        yield


def along(f, params, tokens, mask):
    """A direction in which all parameters move."""
    return direction_like(params, lf.random.key(7))


def reverse_over_reverse(f, params, tokens, mask):
    return torch.func.vjp(lambda p: torch.func.grad(f)(p, tokens, mask), params)[1](along(f, params, tokens, mask))


def each(f, params, tokens, mask):
    return torch.vmap(torch.func.grad(f), (None, 0, 0))(params, tokens, mask)


def of_models(f, params, tokens, mask):
    many = lf.tree.map(lambda x: torch.stack([x, 2 * x]), params)
    return torch.vmap(torch.func.grad(f), (0, None, None))(many, tokens, mask)


TRANSFORMS = {
    "value": lambda f, params, tokens, mask: f(params, tokens, mask),
    "grad": lambda f, params, tokens, mask: torch.func.grad(f)(params, tokens, mask),
    "vmap(grad)": each,
    "vmap over models": of_models,
    "jvp": lambda f, *args: torch.func.jvp(lambda p: f(p, *args[1:]), args[:1], (along(f, *args),)),
    "jvp(grad)": lambda f, *args: torch.func.jvp(lambda p: torch.func.grad(f)(p, *args[1:]), args[:1],
                                                 (along(f, *args),)),
    "grad(jvp)": lambda f, *args: torch.func.grad(lambda p: torch.func.jvp(
        lambda q: f(q, *args[1:]), (p,), (along(f, *args),))[1])(args[0]),
    "vjp(grad)": reverse_over_reverse,
    "grad with remat": lambda f, *args: torch.func.grad(functools.partial(f, layer=lf.remat(lf.block)))(*args),
    "autograd": lambda f, params, tokens, mask: torch.autograd.grad(
        f(leaves := lf.tree.map(lambda x: x.clone().requires_grad_(), params), tokens, mask), lf.tree.leaves(leaves)),
    "tied": lambda f, params, tokens, mask: torch.func.grad(
        lambda e: f(params._replace(embedding=e, output=e), tokens, mask))(params.embedding),
    "norms": lambda f, params, tokens, mask: lf.per_sample_norms(f, params, (tokens, mask)),
}
options = st.fixed_dictionaries({"z_loss": st.sampled_from([0.0, 0.3]), "label_smoothing": st.sampled_from([0.0, 0.2])})


@pytest.mark.parametrize("name", TRANSFORMS)
@given(models(max_layers=1), st.integers(1, 900), options)
def test_the_loss_in_chunks_is_its_definition_under_every_transform(name, params, most, options):
    tokens = token_rows(params.config, 3, 5)
    f, args = functools.partial(lf.loss, **options), (params, tokens, tokens % 3 > 0)
    with logits_at_once(most):
        ours = TRANSFORMS[name](f, *args)
    theirs = TRANSFORMS[name](f, *args)
    for a, b in zip(*map(lf.tree.leaves, (ours, theirs)), strict=True):
        assert close(a, b, 1e-9)


@given(keys(), st.sampled_from(["int8", "int4", "adapter"]))
def test_weights_of_other_kinds_go_through(key, kind):
    params, tokens = random_params(CONFIG, key, torch.float32), token_rows(CONFIG, 3, 5)
    adapter = lf.lora.init(key, params, 3, targets=("output", "wq"))
    adapter = lf.tree.map(lambda x: x + 0.1, adapter)
    base = params if kind == "adapter" else lf.quantize(params, kind)

    def f(adapter):
        return lf.loss(lf.lora.apply(base, adapter), tokens)

    theirs = torch.func.grad_and_value(f)(adapter)
    with logits_at_once(100):
        ours = torch.func.grad_and_value(f)(adapter)
    assert all(close(a, b, 1e-4) for a, b in zip(*map(lf.tree.leaves, (ours, theirs)), strict=True))


@given(keys(), st.floats(0, 1), st.floats(0, 2))
def test_smoothing_and_z_loss_are_what_the_papers_say(key, smoothing, z):
    output, x = lf.random.normal(key, (7, 4), torch.float64), lf.random.normal(key, (5, 4), torch.float64)
    targets = torch.tensor([0, 6, 3, 3, 1])
    norm = lf.random.normal(key, (4,), torch.float64)
    logits = F.rms_norm(x, (4,), norm, 1e-5) @ output.T
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    expected = expected + z * logits.exp().sum(-1).log() ** 2
    assert torch.allclose(cross_entropy(norm, output, x, targets, 1e-5, z, smoothing), expected, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made, among those with an axis of the vocabulary, but for the weights."""

    def __init__(self, v):
        super().__init__()
        self.v, self.most = v, 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = f(*args, **(kwargs or {}))
        for x in lf.tree.leaves(result):
            if isinstance(x, torch.Tensor) and self.v in x.shape and CONFIG.dim not in x.shape:
                self.most = max(self.most, x.numel())
        return result


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in ("norms", "vmap over models")])
def test_no_more_logits_are_made_at_once_than_fit(name):
    params, tokens = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, 3, 9)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with logits_at_once(5 * 77), Largest(77) as seen:
        TRANSFORMS[name](lf.loss, params, tokens, mask)
    assert 77 <= seen.most <= 2 * 5 * 77  # beside a number its tangent, in one tensor of two, at most
    with Largest(77) as seen:
        TRANSFORMS[name](lf.loss, params, tokens, mask)
    assert seen.most >= 24 * 77


@pytest.mark.slow
def test_compiled_chunks_are_the_definition():
    params, tokens = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, 3, 5)
    mask = tokens % 3 > 0
    names = ["vmap(grad)", "jvp(grad)"]

    def results(params, tokens, mask):
        return {name: TRANSFORMS[name](lf.loss, params, tokens, mask) for name in names}

    theirs = results(params, tokens, mask)
    with logits_at_once(300):
        ours = torch.compile(results, fullgraph=True, backend="aot_eager")(params, tokens, mask)
    for name in names:
        pairs = zip(*map(lf.tree.leaves, (ours[name], theirs[name])), strict=True)
        assert all(close(a, b, 1e-9) for a, b in pairs), name
