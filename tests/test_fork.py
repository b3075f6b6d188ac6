"""`fork`: sequences that share their beginning are what they would be alone, and the beginning lies in memory once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import models, random_params, token_rows

import llama_fn as lf
from llama_fn.model.cache import Forked

P, N, T = 5, 4, 3  # tokens of the prompt, continuations, tokens of each


def prompt(params: lf.Params, slots: int = 11) -> tuple[torch.Tensor, lf.Cache]:
    tokens = token_rows(params.config, P)
    return tokens, lf.forward(params, tokens, lf.init_cache(params.config, max_len=slots, dtype=params.norm.dtype))[1]


def alone(params: lf.Params, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([lf.forward(params, torch.cat([tokens, row]))[0][P:] for row in rows])


@given(models(), st.integers(0, 99))
def test_a_continuation_is_what_it_would_be_alone(params, seed):
    tokens, cache = prompt(params)
    rows, forked = token_rows(params.config, N, T, seed=seed), lf.fork(cache, (N,), max_len=P + T)
    pieces = []
    for new in rows.split([1, T - 1], 1):
        logits, forked = lf.forward(params, new, forked)
        pieces.append(logits)
    assert (torch.cat(pieces, 1) - alone(params, tokens, rows)).abs().max() < 1e-9
    assert forked.length.tolist() == [P + T] * N


@given(models(), st.lists(st.integers(0, T - 1), min_size=N, max_size=N))
def test_rows_may_be_rewound_to_the_fork_each_by_itself(params, kept):
    tokens, cache = prompt(params)
    first, rows = token_rows(params.config, N, T, seed=7), token_rows(params.config, N, 1)
    _, after = lf.forward(params, first, lf.fork(cache, (N,), max_len=P + T))
    last, _ = lf.forward(params, rows, after._replace(length=P + torch.tensor(kept)))
    for i, count in enumerate(kept):
        whole = torch.cat([tokens, first[i, :count], rows[i]])
        assert (last[i, 0] - lf.forward(params, whole)[0][-1]).abs().max() < 1e-9


@given(models())
def test_under_vmap_and_for_derivatives_a_fork_is_a_fork(params):
    tokens, cache = prompt(params)
    rows, forked = token_rows(params.config, N, T), lf.fork(cache, (N,), max_len=P + T)
    axes = lf.Cache(*(tuple(Forked(None, 0) for _ in leaves) for leaves in forked[:2]), 0)
    mapped = torch.vmap(lambda row, cache: lf.forward(params, row, cache)[0], (0, axes))(rows, forked)
    assert (mapped - alone(params, tokens, rows)).abs().max() < 1e-9

    def total(cache: lf.Cache, rows: torch.Tensor) -> torch.Tensor:
        return lf.forward(params, rows, cache)[0].square().sum()

    # What is shared is moved by all of its continuations.
    ours = torch.func.grad(lambda k: total(
        lf.fork(cache._replace(k=(k, *cache.k[1:])), (N,), max_len=P + T), rows))(cache.k[0])
    theirs = sum(torch.func.grad(lambda k, row=row: total(cache._replace(k=(k, *cache.k[1:])), row))(cache.k[0])
                 for row in rows)
    assert (ours - theirs).abs().max() < 1e-8


@given(models())
def test_the_rows_of_a_batch_are_each_forked(params):
    both = token_rows(params.config, 2, P)
    cache = lf.init_cache(params.config, (2,), max_len=P, dtype=params.norm.dtype)
    _, cache = lf.forward(params, both, cache)
    rows = token_rows(params.config, N, 2, T)
    logits, _ = lf.forward(params, rows, lf.fork(cache, (N,), max_len=P + T))
    for i in range(2):
        assert (logits[:, i] - alone(params, both[i], rows[:, i])).abs().max() < 1e-9


def test_what_is_shared_lies_in_memory_once():
    params = random_params(lf.Config(48, 2, 6, 2, 77, 70), lf.random.key(0))
    _, cache = prompt(params)
    forked = lf.fork(cache, (1000,), max_len=P + 1)
    assert [x.shared.data_ptr() for x in forked.k] == [x.data_ptr() for x in cache.k]
    _, after = lf.forward(params, token_rows(params.config, 1000, 1), forked)
    assert [x.shared.data_ptr() for x in after.v] == [x.data_ptr() for x in cache.v]
    assert after.k[0].own.shape == (1000, 2, 1, 8)

    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            seen.extend(x.untyped_storage().nbytes() for x in lf.tree.leaves(out) if isinstance(x, torch.Tensor))
            return out

    tokens, cache = token_rows(params.config, 8, 1), prompt(params, 3000)[1]._replace(length=torch.tensor(2999))
    forked = lf.fork(cache, (8,), max_len=3000)
    with Sizes():
        lf.forward(params, tokens, forked)
    assert max(seen) < 8 * cache.k[0].untyped_storage().nbytes() / 2  # scores, but never the slots eight times


@pytest.mark.slow
def test_a_compiled_step_writes_a_forks_own_slots_in_place():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0), torch.float32)
    tokens, cache = prompt(params)
    rows, forked = token_rows(params.config, N, T), lf.fork(cache, (N,), max_len=P + T)
    step, places, pieces = lf.jit(lf.forward, donate="cache"), [x.data_ptr() for x in lf.tree.leaves(forked)], []
    for new in rows.split(1, 1):
        logits, forked = step(params, new, forked)
        pieces.append(logits.clone())
    assert (torch.cat(pieces, 1) - alone(params, tokens, rows)).abs().max() < 1e-4
    assert [x.data_ptr() for x in lf.tree.leaves(forked)] == places


def test_forks_that_cannot_be_are_refused():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0))
    _, cache = prompt(params)
    forked = lf.fork(cache, (N,), max_len=P + T)
    with pytest.raises(ValueError, match="fork: this cache is forked already"):
        lf.fork(forked, (2,), max_len=20)
    with pytest.raises(ValueError, match="fork: max_len counts what is shared, too: more than 5 is needed, got 5"):
        lf.fork(cache, (2,), max_len=5)
    with pytest.raises(ValueError, match=r"fork: the rows must be of one length, got \[4, 5\]"):
        lf.fork(lf.init_cache(params.config, (2,), max_len=9)._replace(length=torch.tensor([5, 4])), (2,), max_len=20)
    with pytest.raises(ValueError, match="length must be at least 5, where it was forked, got 4"):
        lf.forward(params, token_rows(params.config, N, 1), forked._replace(length=forked.length - 1))
    with pytest.raises(ValueError, match="it has 8 slots, 5 are in use, and 4 more tokens came"):
        lf.forward(params, token_rows(params.config, N, 4), forked)
