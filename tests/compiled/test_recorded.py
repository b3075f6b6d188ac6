"""`recorded`: a step that is replayed is the step. In place of a GPU's graph stands one that runs the step again."""

import functools
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_params, token_rows

import llama_fn as lf
from llama_fn import modes
from llama_fn.compiled import cuda_graph as module
from llama_fn.compiled import decoding, recording
from llama_fn.compiled.cuda_graph import recorded, rounded_up
from llama_fn.compiled.trace import tensors_of
from llama_fn.generation import decode
from llama_fn.mesh import Sharded, Sharding
from llama_fn.model import transformer
from llama_fn.model.init import abstract_params
from llama_fn.ops import extent, inside
from llama_fn.ops import room as kv

CONFIG = lf.Config(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=34, max_seq_len=900)


@pytest.fixture
def graphs(monkeypatch):
    """How often something was recorded, and replayed, and the slots that were read by what was not replayed. Meanwhile,
    as on a GPU, no number can be read, and every shape is what it was when it was recorded.
    """
    counts, at_work, reach = {"recorded": 0, "replayed": 0, "reach": []}, [], transformer.slots_to_read

    def run(f, slots):
        at_work.append(slots)
        try:
            return f()
        finally:
            at_work.pop()

    def captured(f, device, pools):
        counts["recorded"] += 1
        result = run(f, None)
        slots = counts["reach"][-1]
        results = tensors_of(result)
        for x in results:
            if x.data_ptr() not in places:  # a GPU has not run it yet: its results are whatever was there
                x.data.fill_(-7)

        def replay():
            counts["replayed"] += 1
            for old, new in zip(results, tensors_of(run(f, slots)), strict=True):
                old.copy_(new)

        return replay, result

    def reached(leaf, length, new):
        if at_work and at_work[-1] is not None:
            return at_work[-1]
        counts["reach"].append(reach(leaf, length, new))
        return counts["reach"][-1]

    def another(x):
        return x.detach() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    def record(f, args, fixed, *rest):  # a graph knows memory and no tensors
        places[:] = [x.data_ptr() for x in fixed]
        return original(f, lf.tree.map(another, args), fixed, *rest)

    places, original = [], module.record
    monkeypatch.setattr(module, "record", record)
    monkeypatch.setattr(recording, "captured", captured)
    for place in (modes, module, extent):
        monkeypatch.setattr(place, "on_gpu", lambda x: True)
    monkeypatch.setattr(transformer, "slots_to_read", reached)
    for place in (modes, module):
        monkeypatch.setattr(place, "recording", lambda x: bool(at_work))
    return counts


def donated(params: lf.Params, tokens: torch.Tensor, cache: lf.Cache) -> tuple[torch.Tensor, lf.Cache]:
    """`forward`, its new cache in the memory of the old."""
    logits, new = lf.forward(params, tokens, cache)
    for old, x in zip(cache.k + cache.v, new.k + new.v, strict=True):
        old.copy_(x)
    return logits, cache._replace(length=new.length)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, lf.random.key(0), torch.float32)


@pytest.mark.parametrize("rows", [(), (5,)])
@pytest.mark.parametrize("new", [1, 2])
def test_a_replayed_step_is_the_step(graphs, params, rows, new):
    step, cache = recorded(donated), lf.init_cache(CONFIG, rows, max_len=300)
    tokens = token_rows(CONFIG, *rows, 300)
    full, _ = lf.forward(params, tokens)
    graphs["reach"].clear()
    places, got = [x.data_ptr() for x in cache.k + cache.v], []
    for t in range(0, 300, new):
        logits, cache = step(params, tokens[..., t:t + new], cache)
        assert (cache.length == t + new).all()
        got.append(logits)
    assert (torch.cat(got, -2) - full).abs().max() < 1e-4  # no later replay wrote to an earlier result
    assert [x.data_ptr() for x in cache.k + cache.v] == places
    assert graphs["recorded"] <= 30 and graphs["replayed"] >= 300 // new - 30
    assert graphs["reach"][::2] == graphs["reach"][1::2]  # what is recorded has run before, with as many slots
    with pytest.raises(ValueError, match=f"the cache is full: it has 300 slots, {301 - new} are in use"):
        step(params, tokens[..., :new], cache._replace(length=torch.full(rows, 301 - new)))


def test_rows_may_be_of_other_lengths_and_go_back(graphs, params):
    step, tokens = recorded(donated), token_rows(CONFIG, 5, 40)
    cache = lf.init_cache(CONFIG, (5,), max_len=64)
    for t in range(20):
        _, cache = step(params, tokens[:, t:t + 1], cache)
    lengths = [20, 3, 11, 18, 1]
    cache = cache._replace(length=torch.tensor(lengths))
    for more in range(5):
        logits, cache = step(params, tokens[:, 30 + more, None], cache)
    for row, length in enumerate(lengths):
        alone, _ = lf.forward(params, torch.cat([tokens[row, :length], tokens[row, 30:35]]))
        assert (logits[row, -1] - alone[-1]).abs().max() < 1e-4
    assert graphs["replayed"] > 15
    with pytest.raises(ValueError, match="a cache's length must be at least 0, got -1"):
        step(params, tokens[:, :1], cache._replace(length=torch.tensor([5, -1, 3, 4, 4])))


def test_weights_that_are_divided_over_devices_are_not_recorded(graphs, params):
    def part(path, weight, x):
        axes = tuple(weight.axes.split())
        return Sharded(x, Sharding(axes, (None,) * len(axes), ()))

    parts = lf.tree.map_with_path(part, abstract_params(CONFIG), params)
    step, tokens, cache = recorded(donated), token_rows(CONFIG, 6), lf.init_cache(CONFIG, max_len=64)
    full, _ = lf.forward(params, tokens)
    for t in range(6):
        logits, cache = step(parts, tokens[t:t + 1], cache)
        assert (logits[-1] - full[t]).abs().max() < 1e-4
    assert graphs["recorded"] == 0


def test_other_weights_are_never_taken_for_those_that_were_recorded(graphs, params):
    step, token = recorded(donated), torch.tensor([5])
    cache = lf.init_cache(CONFIG, max_len=64)
    for i in range(4):  # a tree that is gone leaves its identities to the next
        other = lf.tree.map(lambda x, i=i: x * (1 + i / 10), params)
        for _ in range(3):
            empty = cache._replace(length=torch.tensor(0))
            logits, cache = step(other, token, empty)
            expected, _ = lf.forward(other, token)
            assert (logits - expected).abs().max() < 1e-4
        del other
        gc.collect()
    assert graphs["replayed"] == 8  # each tree ran once before
    weight = params.output
    changed = params._replace(output=weight.clone())
    for scale in (1, 2, 3):  # other memory under the same name
        changed.output.data = weight * scale
        for _ in range(3):
            logits, cache = step(changed, token, cache._replace(length=torch.tensor(0)))
            assert (logits - lf.forward(changed, token)[0]).abs().max() < 1e-4


def test_identities_that_come_again_are_told_apart(graphs, params, monkeypatch):
    monkeypatch.setattr(module, "_key", lambda args, reached: reached)  # as if each tree were where the last one was
    step, token, cache = recorded(donated), torch.tensor([5]), lf.init_cache(CONFIG, max_len=64)
    for i in range(3):
        other = lf.tree.map(lambda x, i=i: x * (1 + i / 10), params)
        for _ in range(4):
            logits, cache = step(other, token, cache._replace(length=torch.tensor(0)))
            assert (logits - lf.forward(other, token)[0]).abs().max() < 1e-4
        del other
        gc.collect()
    assert graphs["recorded"] == 3 and graphs["replayed"] == 9  # each ran once before it was recorded


def test_the_host_reads_a_length_once(graphs, params, monkeypatch):
    monkeypatch.setattr(kv, "PAGE", 64)
    step, cache, reads = recorded(donated), lf.init_cache(CONFIG, (5,), max_len=200), []
    min_max = extent.min_max
    for place in (extent, inside):
        monkeypatch.setattr(place, "min_max", lambda x: reads.append(x.shape) or min_max(x))
    for t in range(6):
        _, cache = step(params, torch.full((5, 1), t), cache)
        if t == 0:
            assert reads == [(5,), (5, 1)]  # the length, and the tokens of what runs as it is
            reads.clear()
    assert reads == [] and graphs["replayed"] == 5
    another = recorded(donated)  # what one has read is its own
    another(params, torch.full((5, 1), 7), cache)
    assert reads == [(5,), (5, 1)]
    reads.clear()
    lf.forward(params, torch.full((5, 1), 7), cache)  # and nothing is kept for eager code, which reads once a call
    lf.forward(params, torch.full((5, 1), 7), cache)
    assert reads == 2 * [(5, 1), (5,)]
    reads.clear()
    cache.length.fill_(3)  # what was written to is read again
    step(params, torch.full((5, 1), 7), cache)
    assert reads == [(5,)]


def test_a_token_outside_the_vocabulary_is_nan_where_it_cannot_be_read(graphs, params):
    step, cache = recorded(donated), lf.init_cache(CONFIG, (2,), max_len=64)
    with pytest.raises(ValueError, match="token 77 is outside the vocabulary of 77 tokens"):
        step(params, torch.tensor([[1], [77]]), cache)
    for _ in range(3):
        logits, cache = step(params, torch.tensor([[1], [2]]), cache)
    for bad in (77, -1):
        logits, after = step(params, torch.tensor([[1], [bad]]), cache)
        assert logits[1].isnan().all() and not logits[0].isnan().any()
        cache = after._replace(length=cache.length)
    logits, _ = step(params, torch.tensor([[1], [2]]), cache)
    assert not logits.isnan().any() and graphs["replayed"] >= 3


def test_what_is_mapped_or_differentiated_or_not_donated_runs_as_it_is(graphs, params):
    step, token = recorded(lf.forward), torch.tensor([5])
    cache, before = (lf.init_cache(CONFIG, batch, max_len=64) for batch in ((4,), ()))
    leaves = lf.tree.map(lambda x: x.clone().requires_grad_(), params)
    for _ in range(3):
        torch.vmap(functools.partial(step, params), (None, 0))(token, cache)
        torch.func.grad(lambda p: step(p, token, before)[0].sum())(params)
        leaves.output.grad = None
        step(leaves, token, before)[0].sum().backward()
        assert leaves.output.grad.any()
    for _ in range(3):
        _, after = step(params, token, before)
        assert not before.k[0].any() and after.k[0].any()


def test_a_forked_cache_is_not_rewound_to_before_its_fork(graphs, params):
    step, tokens = recorded(forked), torch.full((2, 1), 5)
    _, whole = lf.forward(params, token_rows(CONFIG, 20), lf.init_cache(CONFIG, max_len=20))
    cache = lf.fork(whole, (2,), max_len=60)
    for _ in range(10):
        _, cache = step(params, tokens, cache)
    assert graphs["replayed"] > 3
    with pytest.raises(ValueError, match="a cache's length must be at least 20, where it was forked, got 10"):
        step(params, tokens, cache._replace(length=torch.tensor([10, int(cache.length[0])])))


def forked(params: lf.Params, tokens: torch.Tensor, cache: lf.Cache) -> tuple[torch.Tensor, lf.Cache]:
    logits, new = lf.forward(params, tokens, cache)
    for old, x in zip(lf.tree.leaves(cache[:2]), lf.tree.leaves(new[:2]), strict=True):
        old.copy_(x)
    return logits, cache._replace(length=new.length)


def test_a_gradient_that_is_asked_for_later_is_there(graphs, params):
    step, token = recorded(lf.forward), torch.tensor([5])
    weights, cache = lf.tree.map(torch.clone, params), lf.init_cache(CONFIG, max_len=64)
    for _ in range(3):
        step(weights, token, cache)
    assert graphs["replayed"] == 2
    weights.output.requires_grad_()
    assert step(weights, token, cache)[0].requires_grad
    with torch.no_grad():
        for _ in range(3):
            assert not step(weights, token, cache)[0].requires_grad
    assert graphs["replayed"] == 4


def test_what_else_an_argument_says_is_part_of_a_recording(graphs, params):
    def scaled(params: lf.Params, tokens: torch.Tensor, cache: lf.Cache, scale: float | list) -> tuple:
        logits, cache = donated(params, tokens, cache)
        return logits * (scale[0] if isinstance(scale, list) else scale), cache

    step, token, cache = recorded(scaled), torch.tensor([5]), lf.init_cache(CONFIG, max_len=64)
    plain, _ = lf.forward(params, token)
    for scale in (-1, -2, 1.5) * 4:  # -1 and -2 have the same hash
        logits, cache = step(params, token, cache=cache._replace(length=torch.tensor(0)), scale=scale)
        assert (logits - scale * plain).abs().max() < 1e-4
    assert graphs["recorded"] == 3 and graphs["replayed"] == 9
    assert (step(params, token, cache._replace(length=torch.tensor(0)), [1])[0] - plain).abs().max() < 1e-4


def test_what_makes_a_length_of_its_own_is_not_recorded(graphs, params):
    def back_again(params: lf.Params, tokens: torch.Tensor, cache: lf.Cache) -> tuple[torch.Tensor, lf.Cache]:
        logits, new = donated(params, tokens, cache)
        return logits, new._replace(length=new.length - 1)

    token, plain = torch.tensor([5]), lf.forward(params, torch.tensor([5]))[0]
    for f in (back_again, lambda *args: back_again(*args)[0], lambda *args: [*back_again(*args)]):
        step, cache = recorded(f), lf.init_cache(CONFIG, max_len=64)
        for _ in range(4):
            result = step(params, token, cache)
            assert ((result if isinstance(result, torch.Tensor) else result[0]) - plain).abs().max() < 1e-4
    tried = graphs["recorded"]
    with torch.inference_mode():
        step, cache = recorded(donated), lf.init_cache(CONFIG, max_len=64)
        for _ in range(4):
            logits, cache = step(params, token, cache._replace(length=torch.tensor(0)))
            assert (logits - plain).abs().max() < 1e-4
    empty = lf.init_cache(CONFIG, (0,), max_len=64)
    assert recorded(donated)(params, token.new_zeros((0, 1)), empty)[0].shape == (0, 1, 77)
    assert graphs["replayed"] == 0 and graphs["recorded"] == tried


@pytest.mark.parametrize(("most", "left"), [(3, 3), (6, 4)])
def test_recordings_end_with_their_tensors_and_are_not_too_many(graphs, params, monkeypatch, most, left):
    monkeypatch.setattr(module, "MAX_RECORDINGS", most)
    step, token, kept = recorded(donated), torch.tensor([5]), []
    known = dict(zip(step.__code__.co_freevars, step.__closure__, strict=True))["ours"].cell_contents.known
    for i in range(8):
        cache = lf.init_cache(CONFIG, max_len=64)
        kept += [cache] if i > 3 else []
        for _ in range(3):
            _, cache = step(params, token, cache._replace(length=torch.tensor(0)))
    assert graphs["recorded"] == 8 and len(known) == left


def test_a_large_model_tells_the_same_by_recordings(graphs, monkeypatch):
    monkeypatch.setattr(kv, "PAGE", 64)
    model, several = lf.load("stories"), ["Once upon a time", "One day", "Long ago there lived a man called"]

    def told():
        return [lf.text_completion(model, several, key=lf.random.key(4), max_new_tokens=23, sampler=lf.sampler(t),
                                   stop=("girl", "boy", "She ", "He ")) for t in (0, 1)]

    eager = told()
    monkeypatch.setattr(decoding, "LARGE", 0)
    monkeypatch.setattr(decoding, "by_shape", lambda f, **_: f)  # compiled, it is tested elsewhere
    monkeypatch.setattr(decoding, "by_layers", lambda f: recorded(functools.partial(donating, f)))
    monkeypatch.setattr(decode, "_compiled", decoding.decoder(decode._forward_and_draw, decode.drawn))
    assert told() == eager and graphs["replayed"] > 8


def donating(f, *args):
    cache = next(x for x in args if isinstance(x, lf.Cache))
    first, new, *rest = f(*args)
    for old, x in zip(cache.k + cache.v, new.k + new.v, strict=True):
        old.copy_(x)
    return first, cache._replace(length=new.length), *rest


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_a_recording_reads_whole_pages_a_quarter_more_at_most(most, slots):
    most = min(most, slots)
    reached = rounded_up(most, slots)
    assert most <= reached <= max(most, slots - 1)
    if (whole := slots // kv.PAGE * kv.PAGE) > most:
        assert (reached + 1) % kv.PAGE == 0
        assert reached + 1 <= max(1.25 * (most + 1) + kv.PAGE, 2 * kv.PAGE) and reached < whole
