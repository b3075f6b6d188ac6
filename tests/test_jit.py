"""`jit`: compiled equals eager, donation reuses memory, and a decode loop compiles once."""

import pytest
import torch
from strategies import random_params, token_rows

import llama_fn as lf
from llama_fn.cli.bench_transforms import peak_bytes
from llama_fn.generation import decode
from llama_fn.training import optim
from llama_fn.training.step import make_step

CONFIG = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)


def test_donation_is_asked_for_by_name():
    with pytest.raises(ValueError, match=r"jit: forward has no argument 'kv' to donate, only params, tokens, cache"):
        lf.jit(lf.forward, donate="kv")


@pytest.mark.slow
def test_compiled_decode_equals_eager_and_compiles_once():
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    tokens = token_rows(CONFIG, 5, 12)
    full, _ = lf.forward(params, tokens)
    step = lf.jit(lf.forward, donate="cache")
    cache = lf.init_cache(CONFIG, (5,), max_len=13)
    addresses = [x.data_ptr() for x in lf.tree.leaves(cache)]
    pieces = []
    torch._dynamo.utils.counters.clear()
    for t in range(12):
        logits, cache = step(params, tokens[:, t:t + 1], cache)
        pieces.append(logits.clone())
    assert (torch.cat(pieces, 1) - full).abs().max() < 1e-4
    assert [x.data_ptr() for x in lf.tree.leaves(cache)] == addresses  # the memory of the first cache, to the end
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_layers_share_one_compiled_block_that_writes_in_place():
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    tokens = token_rows(CONFIG, 12)
    full, _ = lf.forward(params, tokens)
    step = lf.jit_layers()
    cache = lf.init_cache(CONFIG, max_len=1100)
    leaf, addresses = cache.k[0].nbytes, [x.data_ptr() for x in cache.k + cache.v]
    pieces = []
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for t in range(1000):
            logits, cache = step(params, tokens[t % 12, None], cache)
            pieces.append(logits)
        assert (torch.cat(pieces[:12]) - full).abs().max() < 1e-4
        assert [x.data_ptr() for x in cache.k + cache.v] == addresses
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the block and the head, at every length
        assert peak_bytes(lambda: step(params, tokens[:1], cache)) < leaf


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["forward", "vmap", "grad", "vmap(grad)"])
def test_compiled_equals_eager(transform):
    functions = {
        "forward": lambda params, tokens: lf.forward(params, tokens)[0],
        "vmap": torch.vmap(lambda params, tokens: lf.forward(params, tokens)[0], (None, 0)),
        "grad": torch.func.grad(lf.loss),
        "vmap(grad)": torch.vmap(torch.func.grad(lf.loss), (None, 0)),
    }
    config = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)
    params, tokens = random_params(config, lf.random.key(0), torch.float32), token_rows(config, 3, 7)
    eager = functions[transform](params, tokens)
    compiled = torch.compile(functions[transform], fullgraph=True)(params, tokens)
    pairs = zip(lf.tree.leaves(eager), lf.tree.leaves(compiled), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-4  # float32, the sums in another order


@pytest.mark.slow
def test_two_donated_arguments_of_one_kind_take_two_results():
    swap = lf.jit(lambda a, b: (b + 1, a + 2), donate=("a", "b"))
    a, b = torch.zeros(3), torch.ones(3)
    one, two = swap(a, b)
    assert one.tolist() == [2.0] * 3 and two.tolist() == [2.0] * 3
    assert one.data_ptr() == a.data_ptr() and two.data_ptr() == b.data_ptr()


@pytest.mark.slow
def test_a_donated_argument_may_be_handed_on():
    swapped = lf.jit(lambda a, b: (b, a), donate=("a", "b"))(torch.zeros(3), torch.ones(3))
    assert [x.tolist() for x in swapped] == [[1.0] * 3, [0.0] * 3]
    kept = lf.jit(lambda p: (p - 1, p), donate="p")(torch.ones(3))
    assert [x.tolist() for x in kept] == [[0.0] * 3, [1.0] * 3]
    turned = lf.jit(lambda pair: (pair[::-1],), donate="pair")((torch.zeros(2), torch.ones(2)))
    assert [x.tolist() for x in turned[0]] == [[1.0] * 2, [0.0] * 2]


@pytest.mark.slow
def test_there_may_be_many_jitted_functions_and_many_shapes():
    def power(n):
        return lambda x: x**n

    assert [float(lf.jit(power(n))(torch.tensor([2.0]))) for n in range(10)] == [2.0**n for n in range(10)]
    total = lf.jit(lambda x: x.sum())
    assert [float(total(torch.ones(n))) for n in range(1, 13)] == list(range(1, 13))


@pytest.mark.slow
def test_what_no_result_can_take_cannot_be_donated():
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    step = lf.jit(lf.forward, donate="params")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no part of the result has the structure, shapes and"):
        step(params, token_rows(CONFIG, 3))


@pytest.mark.slow
def test_a_compiled_train_step_equals_the_eager_one_in_place():
    config = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70)
    params = random_params(config, lf.random.key(0), torch.float32)
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2, mask=optim.matrices))
    step, state = make_step(optimizer), optimizer.init(params)
    tokens = token_rows(config, 2, 3, 8)
    mask = tokens != 5
    eager = step(params, state, tokens, mask)
    ours, ours_state = lf.tree.map(torch.clone, (params, state))
    compiled = lf.jit(step, donate=("params", "opt_state"))(ours, ours_state, tokens, mask)
    for a, b in zip(lf.tree.leaves(eager), lf.tree.leaves(compiled), strict=True):
        assert (a - b).abs().max() < 1e-4
    assert compiled[0].embedding.data_ptr() == ours.embedding.data_ptr()


def test_without_a_compiler_all_runs_as_it_is_and_says_why(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler 'no-such-compiler', so <lambda> runs as it is, slower"):
        double = lf.jit(lambda x: 2 * x, donate="x")
    x = torch.ones(3)
    assert double(x).tolist() == [2.0] * 3 and x.tolist() == [1.0] * 3


@pytest.mark.slow
def test_a_large_model_is_stepped_compiled_and_writes_the_same_text(monkeypatch):
    model, key, prompt = lf.load("stories"), lf.random.key(4), "Once upon a time"

    def told(t):
        return lf.text_completion(model, [prompt], key=key, max_new_tokens=24, sampler=lf.sampler(t), logprobs=True)[0]

    eager = [told(t) for t in (0, 1)]
    monkeypatch.setattr(decode, "LARGE", 0)
    torch._dynamo.utils.counters.clear()
    for t, plain in zip((0, 1), eager, strict=True):
        assert told(t).text == plain.text
        assert told(t).logprobs == pytest.approx(plain.logprobs, abs=1e-3)
        pieces = lf.stream(model, prompt, key=key, max_new_tokens=24, sampler=lf.sampler(t))
        assert "".join(pieces) == plain.text
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
