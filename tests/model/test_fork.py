"""`fork`: sequences that share their beginning are what they would be alone, and the beginning lies in memory once."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import models, random_params, token_rows

import llama_fn as lf
from llama_fn.generation import state as rows_state
from llama_fn.ops.slots import Forked

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


@given(models(), st.sampled_from(["all", "a mask", "twice", "one"]))
def test_rows_that_are_chosen_go_on_as_they_would_alone(params, which):
    tokens, cache = prompt(params)
    n = params.config.n_kv_heads  # as many rows as heads, or an index of one could hide as the other's
    first, last = token_rows(params.config, n, 1, seed=7), token_rows(params.config, n, T - 1, seed=8)
    nats, after = lf.forward(params, first, lf.fork(cache, (n,), max_len=P + T))
    rows = {"all": list(range(n))[::-1], "a mask": torch.arange(n) != 0, "twice": [1] * n, "one": [n - 1]}[which]
    some, *_ = rows_state.select(rows_state.State(after, nats[:, 0], first), rows)
    assert all(map(torch.equal, lf.tree.leaves(some), lf.tree.leaves(lf.select(after, rows))))
    assert [x.shared.data_ptr() for x in some.k] == [x.data_ptr() for x in cache.k]
    new = last[:len(some.length)]
    logits, _ = lf.forward(params, new, some)
    whole = torch.cat([first[rows], new], 1)
    assert (logits - alone(params, tokens, whole)[:, 1:]).abs().max() < 1e-9

    def indexed() -> torch.Tensor:
        return lf.forward(params, new, lf.tree.map(lambda x: x[rows], after))[0]

    with pytest.raises(IndexError, match="out of (bounds|range)|does not match"):
        indexed()
    with pytest.raises(ValueError, match="size in the mapped dimension"):
        torch.vmap(lambda row, cache: lf.forward(params, row, cache)[0])(last, after)


def test_an_index_into_each_leaf_of_a_fork_is_right_or_an_error():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0))
    tokens, cache = prompt(params)
    for n in (1, 2, 3):
        first, last = token_rows(params.config, n, 1, seed=7), token_rows(params.config, n, T - 1, seed=8)
        _, after = lf.forward(params, first, lf.fork(cache, (n,), max_len=P + T))
        told = 0
        for rows in ([0], [-1], [0] * n, [-1] * n, list(range(n)), [n - 1], slice(n), slice(n // 2, n), slice(-1, None),
                     slice(None, None, 2), torch.arange(n) == 0, torch.arange(n) >= 0):
            new = last[:len(first[rows])]
            try:
                logits, _ = lf.forward(params, new, lf.tree.map(lambda x: x[rows], after))  # noqa: B023
            except (IndexError, ValueError) as error:
                assert any(said in str(error) for said in ("lf.select", "out of", "does not match")), error
            else:
                whole = torch.cat([first[rows], new], 1)
                assert logits.shape[:2] == new.shape and torch.allclose(logits, alone(params, tokens, whole)[:, 1:])
                told += 1
        assert told > 4
    with pytest.raises(ValueError, match=r"rows of axes \[2\], and what they share is of \[0\], .* with lf.select"):
        lf.forward(params, last[1:], lf.tree.map(lambda x: x[1:], after))


@given(models(max_layers=1))
def test_rows_of_a_batch_that_is_forked_are_chosen_by_either_axis(params):
    both = token_rows(params.config, 3, P)
    _, cache = lf.forward(params, both, lf.init_cache(params.config, (3,), max_len=P, dtype=params.norm.dtype))
    rows = token_rows(params.config, N, 3, T)
    forked = lf.fork(cache, (N,), max_len=P + T)
    expected, _ = lf.forward(params, rows, forked)
    some, _ = lf.forward(params, rows[[3, 1]], lf.select(forked, [3, 1]))
    one, _ = lf.forward(params, rows[:, 2], lf.tree.map(lambda x: x[:, 2], forked))
    again = lf.select(lf.fork(lf.tree.map(lambda x: x[[0, 2]], cache), (), max_len=P + T), [1, 0])
    assert (some - expected[[3, 1]]).abs().max() < 1e-9 and (one - expected[:, 2]).abs().max() < 1e-9
    assert (lf.forward(params, rows[0, [2, 0]], again)[0] - expected[0, [2, 0]]).abs().max() < 1e-9


@given(models(max_layers=1), st.integers(0, P))
def test_rows_part_where_they_are_told_to(params, at):
    tokens, cache = prompt(params)
    rows, caches = token_rows(params.config, N, T), lf.tree.map(lambda x: torch.stack([x, x]), cache)

    def after(cache: lf.Cache) -> torch.Tensor:
        return lf.forward(params, rows, lf.fork(cache, (N,), max_len=P + T, at=at))[0]

    expected = torch.stack([lf.forward(params, torch.cat([tokens[:at], row]))[0][at:] for row in rows])
    assert (after(cache) - expected).abs().max() < 1e-9
    assert (torch.vmap(after)(caches) - expected).abs().max() < 1e-9


@pytest.mark.slow
def test_a_compiled_fork_is_a_fork():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0))
    _, cache = prompt(params)
    caches, rows = lf.tree.map(lambda x: torch.stack([x, 2 * x]), cache), token_rows(params.config, N, T)

    def both(cache: lf.Cache, at: int | None = None) -> tuple:
        def after(cache: lf.Cache) -> torch.Tensor:
            return lf.forward(params, rows, lf.fork(cache, (N,), max_len=P + T, at=at))[0]

        return after(cache), torch.vmap(after)(caches)

    compiled = torch.compile(functools.partial(both, at=P), fullgraph=True, backend="aot_eager")
    assert all(torch.allclose(a, b) for a, b in zip(compiled(cache), both(cache, P), strict=True))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"length cannot be read; give it as at=\.\.\."):
        torch.compile(both, fullgraph=True, backend="eager")(cache)


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
    with pytest.raises(ValueError, match=r"fork: batch is a tuple of sizes, as \(5,\) for five rows, got 5"):
        lf.fork(cache, 5, max_len=20)
    with pytest.raises(ValueError, match="fork: a size in batch must be at least 1, got 0"):
        lf.fork(cache, (2, 0), max_len=20)
    with pytest.raises(ValueError, match="fork: max_len must be an integer, got 20.5"):
        lf.fork(cache, (2,), max_len=20.5)
    for at in (0, P):
        assert lf.fork(cache, (2,), max_len=20, at=at).length.tolist() == [at, at]
    for at in (-1, 6):
        with pytest.raises(ValueError, match=f"fork: rows part after 0 tokens or more, of .* got at={at}"):
            lf.fork(cache, (2,), max_len=20, at=at)
    with pytest.raises(ValueError, match="mapped, a cache's length cannot be read; give it as at="):
        torch.vmap(lambda cache: lf.fork(cache, (2,), max_len=20))(lf.tree.map(lambda x: x[None], cache))
    with pytest.raises(ValueError, match="length must be at least 5, where it was forked, got 4"):
        lf.forward(params, token_rows(params.config, N, 1), forked._replace(length=forked.length - 1))
    with pytest.raises(ValueError, match="it has 8 slots, 5 are in use, and 4 more tokens came"):
        lf.forward(params, token_rows(params.config, N, 4), forked)
