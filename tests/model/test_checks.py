"""Integers outside of memory: every way to run a function ends in a Python error, before anything is written."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_params, token_rows
from torch.fx.experimental.proxy_tensor import make_fx

import llama_fn as lf

CONFIG = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)
OUTSIDE = st.one_of(st.integers(-2**40, -1), st.integers(77, 2**40))


@pytest.fixture(scope="module")
def params() -> lf.Params:
    return random_params(CONFIG, lf.random.key(0), torch.float32)


def grads(params: lf.Params, rows: torch.Tensor) -> lf.Params:
    return torch.vmap(torch.func.grad(lf.loss), (None, 0))(params, rows)


def mapped(params: lf.Params, rows: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: lf.forward(params, row)[0])(rows)


def norms(params: lf.Params, rows: torch.Tensor) -> torch.Tensor:
    return lf.per_sample_norms(lf.loss, params, rows)


@given(bad=OUTSIDE, row=st.integers(0, 2), place=st.integers(0, 4))
def test_a_token_outside_is_named_wherever_it_is_and_whatever_is_mapped(params, bad, row, place):
    rows = token_rows(CONFIG, 3, 5).index_put((torch.tensor(row), torch.tensor(place)), torch.tensor(bad))
    for f in (lf.forward, lf.loss, mapped, grads, norms):
        with pytest.raises(ValueError, match=f"(token|target) {bad} is outside the vocabulary of 77"):
            f(params, rows)


@given(bad=OUTSIDE)
def test_a_target_outside_that_does_not_count_changes_nothing(params, bad):
    rows, mask = token_rows(CONFIG, 3, 5), torch.ones(3, 5, dtype=torch.bool)
    rows[1, 4], mask[1, 4] = bad, False
    expected = lf.loss(params, rows.clamp(0, 76), mask)
    assert torch.equal(lf.loss(params, rows, mask), expected)


@given(length=st.one_of(st.integers(-2**40, -1), st.integers(7, 2**40)))
def test_a_length_outside_is_an_error_mapped_too(params, length):
    cache = lf.init_cache(CONFIG, (3,), max_len=8)
    cache = cache._replace(length=torch.tensor([0, length, 3]))
    for f in (lf.forward, torch.vmap(lf.forward, (None, 0, 0))):
        with pytest.raises(ValueError, match="the cache is full: it has 8 slots" if length > 0 else f"got {length}"):
            f(params, token_rows(CONFIG, 3, 2), cache)


@given(row=st.one_of(st.integers(-2**40, -4), st.integers(3, 2**40)))
def test_a_row_that_is_not_there_is_named(row):
    with pytest.raises(ValueError, match=f"the cache has 3 rows, 0 to 2, and none is number {row}"):
        lf.select(lf.init_cache(CONFIG, (3,), max_len=4), [0, row])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_rows_are_the_same_whatever_integers_they_are(dtype):
    cache = lf.init_cache(CONFIG, (3,), max_len=4)._replace(length=torch.tensor([5, 6, 7]))
    rows = torch.tensor([0, 0, 1], dtype=dtype)  # torch takes bytes for a mask
    assert lf.select(cache, rows).length.tolist() == [5, 5, 6]
    assert lf.select(cache, []).length.tolist() == []


def test_rows_that_choose_nothing_are_refused():
    cache = lf.init_cache(CONFIG, (3, 2), max_len=4)
    assert lf.select(cache, torch.tensor([[True, False], [True, True], [False, True]])).length.shape == (4,)
    for rows, told in (([True, False], r"the mask is of shape \[2\], the cache's rows of \[3, 2\]"),
                       (torch.ones(3, 3, dtype=torch.bool), r"the mask is of shape \[3, 3\]"),
                       (torch.tensor(True), r"the mask is of shape \[\]"),
                       ([0.0, 1.0], "rows are integers or a mask of booleans, got torch.float32")):
        with pytest.raises(ValueError, match=told):
            lf.select(cache, rows)
    for none in (lf.NoCache(), None):
        with pytest.raises(ValueError, match="select: a cache is needed, got No"):
            lf.select(none, [0])
        with pytest.raises(ValueError, match="fork: a cache is needed, got No"):
            lf.fork(none, (2,), max_len=4)
    with pytest.raises(ValueError, match="the cache is of one sequence, and has no rows"):
        lf.select(lf.init_cache(CONFIG, max_len=4), [0])


def test_a_traced_graph_reads_the_numbers_that_it_is_run_with(params):
    def decode(params, token, length):
        cache = lf.init_cache(CONFIG, max_len=4)
        return lf.forward(params, token, cache._replace(length=length))

    good, token, length = (params, torch.tensor([3]), torch.tensor(2)), torch.tensor([77]), torch.tensor(4)
    graph = make_fx(decode)(*good)
    assert torch.equal(graph(*good)[0], decode(*good)[0])
    for bad, told in (((params, token, good[2]), "token 77"), ((params, good[1], length), "the cache is full")):
        with pytest.raises(ValueError, match=told):
            graph(*bad)


@pytest.mark.slow
@pytest.mark.parametrize("f", [grads, mapped, norms], ids=lambda f: f.__name__)
def test_a_compiled_transform_reads_them_too(params, f):
    run, rows = torch.compile(f, fullgraph=True, backend="aot_eager"), token_rows(CONFIG, 3, 5)
    for new, old in zip(lf.tree.leaves(run(params, rows)), lf.tree.leaves(f(params, rows)), strict=True):
        assert (new - old).abs().max() < 1e-4
    rows[1, 4] = 77
    with pytest.raises(ValueError, match="77 is outside the vocabulary of 77"):
        run(params, rows)


@pytest.mark.slow
def test_after_a_bad_call_a_donated_cache_is_what_it_was(params):
    step, rows = lf.jit(lf.forward, donate="cache"), token_rows(CONFIG, 3, 4)
    _, cache = step(params, rows[:, :2], lf.init_cache(CONFIG, (3,), max_len=3))
    before = lf.tree.map(torch.clone, cache)
    bad = rows[:, :2].index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(-100))
    last = cache._replace(length=torch.tensor([0, -1, 0]))
    for tokens, old, told in ((rows[:, :2], cache, "the cache is full: it has 3 slots, 2 are in use"),
                              (bad, cache._replace(length=torch.zeros(3, dtype=torch.int64)), "token -100"),
                              (rows[:, :2], last, "a cache's length must be at least 0, got -1")):
        length = old.length.clone()
        with pytest.raises(ValueError, match=told):
            step(params, tokens, old)
        assert torch.equal(old.length, length)
        assert all(map(torch.equal, lf.tree.leaves(before), lf.tree.leaves(cache)))
    logits, _ = step(params, rows[:, 1:3], cache._replace(length=torch.ones(3, dtype=torch.int64)))
    assert (logits - lf.forward(params, rows[:, :3])[0][:, 1:]).abs().max() < 1e-4


BAD = '''
import torch, llama_fn as lf
from llama_fn.model.cache import KeysValues
from llama_fn.model.rope import rotation

config = lf.Config(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=77, hidden_dim=40, max_seq_len=64)
params, key, i = lf.init_params(lf.random.key(0), config), lf.random.key(1), torch.tensor
sample = lf.sampler(repetition_penalty=1.5, top_p=0.5)
cache, rows = lf.init_cache(config, max_len=3), lf.init_cache(config, (2,), max_len=3)
layer = KeysValues(rows.k[0][0], rows.v[0][0])

drawn = lf.jit(lambda logits, tokens: sample(key, logits, tokens))

def at(positions):
    return lf.block(params.blocks[0], params.embedding[:2], rotation(positions, 8, 1e4), layer, positions,
                    torch.arange(3), 1e-5)[0]

calls = {
    "token": lambda: torch.compile(lf.forward)(params, i([1, 77]), cache),
    "target": lambda: lf.jit(torch.func.grad(lf.loss))(params, i([1, 2, -100])),
    "gone": lambda: drawn(torch.randn(5), i([4, 5])),
    "row": lambda: lf.jit(lf.select)(rows, i([0, 2])),
    "layers": lambda: lf.jit_layers()(params, i([1]), cache._replace(length=i(3))),
    "a layer": lambda: lf.jit(at)(i([2, 3])).isnan().any(-1).tolist(),
}
for name, call in calls.items():
    try:
        print(f"{name}: {call()}")
    except ValueError as error:
        print(f"{name}: ValueError {error}")
'''


@pytest.mark.slow
def test_no_bad_call_ends_the_process():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BAD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    for name, error in {"token": "token 77", "target": "target -100", "gone": "token 5", "row": "the cache has 2 rows",
                        "layers": "the cache is full"}.items():
        assert told[name].startswith(f"ValueError {error}"), done.stdout
    assert told["a layer"].endswith("True]"), done.stdout


@pytest.mark.slow
def test_an_exported_program_gives_nan(params):
    class Step(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
            cache = lf.init_cache(CONFIG, max_len=4)
            return lf.forward(params, tokens, cache._replace(length=length))[0]

    tokens, i = token_rows(CONFIG, 2), torch.tensor
    program = torch.export.export(Step(), (tokens, i(0)), strict=False)
    assert not [node for node in program.graph.nodes if "llama_fn" in str(node.target)]
    run = program.module()
    assert (run(tokens, i(1)) - Step()(tokens, i(1))).abs().max() < 1e-4
    for bad, place in (((i([1, 77]), i(0)), 1), ((tokens, i(3)), 1), ((tokens, i(-1)), 0)):
        assert run(*bad)[place].isnan().all(), bad
