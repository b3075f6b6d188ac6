"""Torch's default device has no say: tensors lie where the arguments lie, or where the caller says."""

import pytest
import torch
from strategies import random_params, token_rows

import llama_fn as lf
from llama_fn.model.rope import rotation
from llama_fn.training import loop, optim

CONFIG = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)


def results():
    """What the functions that make tensors give, of arguments that are made first, on the CPU."""
    key = lf.random.key(3)
    params = lf.init_params(key, CONFIG)
    tokens = lf.random.bits(key, (3, 5)) % 77
    yield key, params, lf.random.split(key), lf.random.fold_in(key, 5)
    yield from (getattr(lf.random, name)(key, (7,)) for name in ("uniform", "normal", "gumbel", "rademacher"))
    yield lf.random.key(1, "cpu"), lf.random.like(key, params.norm)
    yield rotation(tokens, 8, 1e4), rotation(tokens, 8, 1e4, lf.RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    cache = lf.init_cache(CONFIG, (3,), max_len=9)
    logits, cache = lf.forward(params, tokens, cache)
    yield logits, cache, lf.forward(params, tokens[:, :1], cache), lf.select(cache, [2, 0])
    yield lf.fork(lf.tree.map(lambda x: x[0], cache), (4,), max_len=12)
    yield lf.loss(params, tokens), lf.loss_sum(params, tokens, tokens > 5), torch.func.grad(lf.loss)(params, tokens)
    sample = lf.sampler(0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    yield lf.random.categorical(key, logits), sample(key, logits[0, 0], tokens[0])
    yield lf.per_sample_norms(lf.loss, params, tokens), lf.clipped_sum(lf.loss, params, tokens, 1.0)
    yield lf.private_grads(lf.loss, params, tokens, max_norm=1.0, noise_multiplier=0.5, key=key)
    state = loop.init_state(params, optim.adamw(1e-3))
    yield state, optim.adamw(1e-3).update(params, state.opt_state, params)
    yield lf.forward(lf.quantize(lf.init_params(key, lf.Config(64, 1, 4, 2, 77, 64)), "int8"), tokens)
    yield lf.forward(lf.lora.apply(params, lf.lora.init(key, params, rank=2)), tokens)


@pytest.mark.parametrize("device", ["meta"])
def test_results_are_the_same_whatever_the_default_device(device):
    expected = list(results())
    torch.set_default_device(device)
    try:
        found = list(results())
    finally:
        torch.set_default_device(None)
    assert lf.tree.structure(found) == lf.tree.structure(expected)
    for x, y in zip(lf.tree.leaves(found), lf.tree.leaves(expected), strict=True):
        assert x.device.type == "cpu" and torch.equal(x, y)


def test_text_is_the_same_whatever_the_default_device():
    def told():
        model = lf.load("stories")
        return (lf.text_completion(model, ["Once upon"], key=lf.random.key(0), max_new_tokens=5, logprobs=True),
                lf.score(model, ["One day"]), lf.stories.story(lf.random.key(1)))

    expected = told()
    torch.set_default_device("meta")
    try:
        assert told() == expected
    finally:
        torch.set_default_device(None)


def test_parameters_lie_where_their_key_does():
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    assert lf.init_params(lf.random.key(0), CONFIG, device="meta").norm.is_meta
    assert not lf.init_params(lf.random.key(0), CONFIG).norm.is_meta
    assert lf.init_cache(CONFIG, max_len=3, device="meta").length.is_meta
    assert lf.forward(params, token_rows(CONFIG, 4))[0].device.type == "cpu"
