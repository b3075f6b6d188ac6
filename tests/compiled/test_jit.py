"""`jit` and `jit_layers`: compiled equals eager, donation reuses memory, and a decode loop compiles once."""

import dataclasses
import gc
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from strategies import random_params, token_rows
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

import llama_fn as lf
from llama_fn.bench.transforms import peak_bytes
from llama_fn.compiled import decoding, inductor, layers, whole_step
from llama_fn.generation import decode
from llama_fn.model.linear import written_out
from llama_fn.ops.aten.few_rows import few_rows
from llama_fn.ops.cpu import build
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


@pytest.fixture
def compilations(monkeypatch):
    """What `jit_layers` compiles, by name, where there is no kernel of all layers."""
    names, compiled = [], layers.compiled
    monkeypatch.setattr(whole_step, "values_alone", lambda: False)

    def counted(f, *args):
        names.append(f.__name__)
        return compiled(f, *args)

    monkeypatch.setattr(layers, "compiled", counted)
    return names


@pytest.mark.slow
def test_layers_share_one_compiled_block_that_writes_in_place(compilations):
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    tokens = token_rows(CONFIG, 12)
    full, _ = lf.forward(params, tokens)
    step = lf.jit_layers()
    cache = lf.init_cache(CONFIG, max_len=1100)
    leaf, addresses = cache.k[0].nbytes, [x.data_ptr() for x in cache.k + cache.v]
    pieces = []
    for t in range(1000):
        logits, cache = step(params, tokens[t % 12, None], cache)
        pieces.append(logits)
    assert (torch.cat(pieces[:12]) - full).abs().max() < 1e-4
    assert [x.data_ptr() for x in cache.k + cache.v] == addresses
    assert compilations == ["block", "head"]  # at every length
    assert peak_bytes(lambda: step(params, tokens[:1], cache)) < leaf


@pytest.mark.slow
def test_layers_are_compiled_again_for_what_does_not_fit(compilations):
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    tokens = token_rows(CONFIG, 5, 12)
    full, _ = lf.forward(params, tokens)
    step = lf.jit_layers(donate=())

    def stepped(params: lf.Params, lay: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> torch.Tensor:
        cache, pieces = lf.init_cache(CONFIG, (5,), max_len=12), []
        cache = lf.tree.map(lambda x: lay(x) if x.ndim > 1 else x, cache)
        for t in range(12):
            before = lf.tree.map(torch.clone, cache)
            logits, after = step(params, tokens[:, t:t + 1], cache)
            assert all(map(torch.equal, lf.tree.leaves(before), lf.tree.leaves(cache)))  # nothing was donated
            pieces, cache = [*pieces, logits], after
        return torch.cat(pieces, 1)

    assert (stepped(params) - full).abs().max() < 1e-4  # to the end of the room, too
    count = len(compilations)
    assert (stepped(params) - full).abs().max() < 1e-4 and len(compilations) == count
    for lay in (lambda x: x.mT.contiguous().mT, lambda x: torch.nn.functional.pad(x, (0, 0, 0, 3))[..., :12, :]):
        assert (stepped(params, lay) - full).abs().max() < 1e-4 and len(compilations) > count  # otherwise in memory
        count = len(compilations)
    strided = lf.tree.map(lambda x: x.repeat_interleave(2, -1)[..., ::2], params)  # the same numbers, further apart
    assert (stepped(strided) - full).abs().max() < 1e-4 and len(compilations) > count


@pytest.mark.slow
def test_no_rows_are_compiled_too():
    params, cache = random_params(CONFIG, lf.random.key(0), torch.float32), lf.init_cache(CONFIG, (0,), max_len=9)
    logits, cache = lf.jit_layers()(params, torch.zeros((0, 1), dtype=torch.int64), cache)
    assert logits.shape == (0, 1, 77) and cache.length.shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_layers_of_integers_are_compiled_too(compilations, bits):
    config = lf.Config(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=77, hidden_dim=192, max_seq_len=64)
    params, step = lf.quantize(random_params(config, lf.random.key(0), torch.float32), bits), lf.jit_layers()
    tokens = token_rows(config, 6)
    full, _ = lf.forward(params, tokens)
    for room in (7, 31):
        cache, pieces = lf.init_cache(config, max_len=room), []
        for t in range(6):
            logits, cache = step(params, tokens[t, None], cache)
            pieces.append(logits)
        assert (torch.cat(pieces) - full).abs().max() < 1e-4
    assert compilations == ["block", "head"]


@pytest.mark.slow
def test_a_prompt_of_any_length_is_compiled_in_8_bits():
    config = lf.Config(dim=128, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=77, hidden_dim=192, max_seq_len=64)
    params = lf.quantize(random_params(config, lf.random.key(0), torch.bfloat16), "int8")
    step, exact = lf.jit_layers(), lf.tree.map(lambda x: x.double(), lf.dequantize(params))
    for count in (9, 65):  # each by another of torch's products
        tokens = token_rows(config, count)
        logits, _ = step(params, tokens, lf.init_cache(config, max_len=70, dtype=torch.bfloat16))
        wanted, _ = lf.forward(exact, tokens)
        assert (logits - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("bits", "dtype", "products"), [
    (None, torch.bfloat16, "linear_floats"), ("int8", torch.float32, None),
    ("int4", torch.bfloat16, "linear_integers")])
def test_a_compiled_layer_is_one_function_of_loops_between_kernels_of_its_own(monkeypatch, own, bits, dtype, products):
    from torch._inductor import compile_fx

    sources, inner = [], compile_fx.compile_fx_inner

    def noted(*args, **kwargs):
        graph = inner(*args, **kwargs)
        sources.append(graph.source_code)
        return graph

    def count(part: str) -> list[int]:
        return [source.count(part) for source in sources]

    monkeypatch.setattr(compile_fx, "compile_fx_inner", noted)
    if own and not build.vector_instructions():
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(build, "vector_instructions", lambda: "AVX2" if own else "")
    monkeypatch.setattr(whole_step, "values_alone", lambda: False)
    config = lf.Config(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=77, hidden_dim=192, max_seq_len=64)
    params = random_params(config, lf.random.key(0), dtype)
    params = params if bits is None else lf.quantize(params, bits)
    lf.jit_layers()(params, token_rows(config, 1), lf.init_cache(config, max_len=9, dtype=dtype))
    kernels = *build.DECODE, *build.PREFILL
    called = {name: count(f"torch.ops.llama_fn.{name}.default(") for name in kernels}
    ours = {products: [4, 1], "attend_one_query": [1, 0]} if own else {}  # in the block, and in the head
    assert called == {name: ours.get(name, [0, 0]) for name in kernels}
    assert count("cpp_pybinding(") == [1 + sum(each) for each in zip(*called.values(), strict=True)]
    assert sum(count("aten.view")) == 0  # nor does torch look at bytes as words


def test_a_graph_is_known_to_torchs_cache_between_processes_as_it_is_compiled(monkeypatch):
    from torch._inductor import compile_fx

    def noted(graph, *args, **kwargs):
        codes.extend([graph.code, graph.graph.python_code("self").src])  # the cache goes by the first
        return lambda numbers: [torch.ones(1, 5)]

    monkeypatch.setattr(compile_fx, "compile_fx_inner", noted)
    codes, weight = [], torch.ones(5, 64, dtype=torch.bfloat16)  # of which the graph is given words of 32 bits
    assert layers.by_shape(few_rows)(weight, weight[:1]).sum() == 5
    assert codes[0] == codes[1] and "view" in codes[0]


@pytest.mark.parametrize(("openssl", "folder", "kept"), [
    (True, True, True), (False, True, False), (True, False, False)])
def test_headers_are_compiled_once_where_torch_can_keep_them(monkeypatch, tmp_path, openssl, folder, kept):
    if not folder:
        (tmp_path / "taken").write_text("")
    monkeypatch.setattr(inductor.shutil, "which", lambda name: openssl or None)
    assert inductor._can_keep_headers(str(tmp_path / "taken" / "headers")) == kept


def test_threads_make_one_graph_at_a_time(monkeypatch):
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda graph, *args, **kwargs: lambda numbers: [numbers[0] + 1])
    doubles = [layers.by_shape(lambda x: 2 * x) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda f: f(torch.ones(5)), doubles))
    assert [y.tolist() for y in made] == [[2.0] * 5] * 4 and not torch.compiler.is_compiling()


def test_no_garbage_is_looked_for_while_a_graph_is_made_and_then_as_before(monkeypatch):
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda graph, *args, **kwargs: lambda numbers: [numbers[0] + 1])
    seen = []

    def f(x):
        seen.append(gc.isenabled())
        if x.ndim > 1:
            raise KeyError("a matrix")
        return x + 1

    traced = layers.by_shape(f)
    try:
        for before in (True, False):
            (gc.enable if before else gc.disable)()
            seen.clear()
            assert (traced(torch.ones(5 if before else 6)) == 2).all() and seen == [False] and gc.isenabled() == before
            with pytest.raises(KeyError):
                traced(torch.ones(2, 3))
            assert gc.isenabled() == before
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_weight_that_begins_within_a_word_is_compiled_apart(compilations):
    product = layers.by_shape(few_rows)
    memory = lf.random.normal(lf.random.key(0), (1 + 5 * 64,), torch.float32).bfloat16()
    x = lf.random.normal(lf.random.key(1), (1, 64), torch.float32).bfloat16()
    for begin in (0, 1, 0):
        weight = memory[begin:begin + 5 * 64].view(5, 64)
        assert (product(weight, x) - written_out(weight.double(), x.double())).abs().max() < 0.1
    assert compilations == ["few_rows"] * 2


@pytest.mark.slow
def test_a_weight_seen_as_words_is_not_kept_and_its_new_memory_is_seen():
    product = layers.by_shape(few_rows)
    one, two = (lf.random.normal(lf.random.key(i), (5, 64), torch.float32).bfloat16() for i in range(2))
    x, weight = torch.ones(1, 64, dtype=torch.bfloat16), one.clone()
    before = product(weight, x)
    assert not torch.equal(before, product(two, x)) and torch.equal(before, product(weight, x))
    weight.data = two.clone()
    assert torch.equal(product(weight, x), product(two, x))
    memory = StorageWeakRef(weight.untyped_storage())
    del weight
    assert memory.expired()


@pytest.mark.slow
def test_a_size_that_decides_is_compiled_again(compilations):
    def of_five(x):
        return x[:5].sum()

    def in_pairs(x):
        return x.sum() if len(x) % 2 else x.unflatten(0, (-1, 2)).sum(0).sum()

    total = layers.by_shape(of_five, dynamic={"x": 0})
    assert [float(total(torch.ones(n))) for n in (8, 9, 3, 20, 4)] == [5, 5, 3, 5, 4]
    assert compilations == ["of_five"] * 2
    total = layers.by_shape(in_pairs, dynamic={"x": 0})  # with one pair, the size is 2 and no other
    assert [float(total(torch.ones(n))) for n in (2, 8, 5, 6, 2)] == [2, 8, 5, 6, 2]


@pytest.mark.slow
def test_layers_that_are_differentiated_or_mapped_run_as_they_are(compilations):
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    tokens = token_rows(CONFIG, 3, 4)
    step = lf.jit_layers(donate=())
    eager = lf.loss(params, tokens)
    grads = torch.func.grad(lambda p: lf.loss(p, tokens, layer=step.__wrapped__.keywords["layer"]))(params)
    leaves = lf.tree.map(lambda x: x.clone().requires_grad_(), params)
    lf.loss(leaves, tokens, layer=step.__wrapped__.keywords["layer"]).backward()
    for ours, plain, expected in zip(*map(lf.tree.leaves, (grads, leaves, torch.func.grad(lf.loss)(params, tokens))),
                                     strict=True):
        assert torch.allclose(ours, expected, atol=1e-6) and torch.allclose(plain.grad, expected, atol=1e-6)
    mapped = torch.vmap(lambda row: step(params, row)[0])(tokens)
    assert torch.equal(mapped, lf.forward(params, tokens)[0]) and not compilations
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(step(params, tokens)[0], lf.forward(params, tokens)[0])
    with FakeTensorMode() as mode:
        assert step(*lf.tree.map(mode.from_tensor, (params, tokens)))[0].shape == (3, 4, CONFIG.vocab_size)
    graph = make_fx(lambda p: lf.loss(p, tokens, layer=step.__wrapped__.keywords["layer"]))(params)
    assert abs(float(graph(params) - eager)) < 1e-5 and not compilations


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


@pytest.mark.slow
def test_a_large_model_is_stepped_compiled_and_writes_the_same_text(monkeypatch, compilations):
    model, key, prompt = lf.load("stories"), lf.random.key(4), "Once upon a time"
    several = [prompt, "One day", "Long ago there lived a man called", "Once there was"]

    def told(prompts, t, stop=("girl", "boy", "She ", "He ")):
        return lf.text_completion(model, prompts, key=key, max_new_tokens=23, sampler=lf.sampler(t), logprobs=True,
                                  stop=stop)

    eager, alone = {t: told(several, t) for t in (0, 1)}, {t: told([prompt], t, ())[0] for t in (0, 1)}
    assert len({len(row.tokens) for row in eager[1]}) == 4  # they leave one after another
    monkeypatch.setattr(decoding, "LARGE", 0)
    monkeypatch.setattr(decode, "_compiled", decoding.decoder(decode._forward_and_draw, decode.drawn))
    for t, rows in eager.items():
        for row, plain in zip(told(several, t), rows, strict=True):
            assert row.text == plain.text and row.logprobs == pytest.approx(plain.logprobs, abs=1e-3)
        assert told([prompt], t, ())[0].logprobs == pytest.approx(alone[t].logprobs, abs=1e-3)
        pieces = lf.stream(model, prompt, key=key, max_new_tokens=23, sampler=lf.sampler(t))
        assert "".join(pieces) == alone[t].text
    # For four rows, two and one; at any length, in any room; and for each sampler with the rows that it was left with.
    assert [name for name in compilations if name != "drawn"] == ["block", "head"] * 3
    assert compilations.count("drawn") == 5


@pytest.mark.parametrize(("level", "bits", "most"), [
    ("AVX2", None, 32), ("AVX2", "int8", 8), ("AVX512", None, 32), ("AVX512", "int4", 8), ("", None, 8)])
def test_as_many_rows_of_a_large_model_are_compiled_as_gain_by_it(monkeypatch, level, bits, most):
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    params = lf.quantize(params, bits) if bits else params
    monkeypatch.setattr(build, "vector_instructions", lambda: level)
    assert decode.step_for(params, 1, lf.sampler()) is decode.step
    monkeypatch.setattr(decoding, "LARGE", 0)
    compiled = [decode.step_for(params, rows, lf.sampler()) is not decode.step for rows in (1, most, most + 1)]
    assert compiled == [True, True, False]


@pytest.mark.slow
def test_a_sampler_of_ones_own_is_asked_at_every_draw(monkeypatch, compilations):
    monkeypatch.setattr(decoding, "LARGE", 0)
    model, key, allowed = lf.load("stories"), lf.random.key(4), [7, 301, 25, 9]
    plain, asked = lf.sampler(), iter(allowed)

    @dataclasses.dataclass  # it has no hash
    class Told:
        what: list[int]

        def __call__(self, key: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return plain(key, logits, tokens) * 0 + next(asked)

    [told] = lf.text_completion(model, ["Once"], key=key, max_new_tokens=4, sampler=Told(allowed))
    assert told.tokens == allowed and "drawn" not in compilations and compilations[:2] == ["block", "head"]


@pytest.mark.slow
def test_conversations_of_a_large_model_share_no_memory_that_is_written_to(monkeypatch):
    model, key = lf.load("stories"), lf.random.key(4)

    def answered(chat: lf.Chat, question: str, pieces: int = 12) -> list[lf.Chat]:
        asked = lf.ask(model, chat, question)
        return [chat for _, chat in itertools.islice(lf.answer(model, asked, key=key, max_new_tokens=12), pieces)]

    def told() -> list[list]:
        chats = answered(lf.Chat(), "Who was the fox?")
        begun, whole = chats[4], chats[-1]
        later = [answered(chat, question)[-1] for chat in (begun, whole, begun) for question in ("why?", "and then?")]
        return [chat.exchanges for chat in (*chats, *later)]

    eager = told()
    monkeypatch.setattr(decoding, "LARGE", 0)
    monkeypatch.setattr(decode, "_compiled", decoding.decoder(decode._forward_and_draw, decode.drawn))
    assert told() == eager


@pytest.mark.slow
def test_a_wrong_call_of_a_jitted_function_is_pythons_own_error():
    params = lf.init_params(lf.random.key(0), lf.Config(48, 1, 6, 2, vocab_size=77, hidden_dim=70))
    step = lf.jit(lf.forward)
    for wrong in (lambda f: f(params), lambda f: f(params, torch.arange(5), tokes=3), lambda f: f()):
        told = []
        for f in (lf.forward, step):
            with pytest.raises(TypeError) as error:
                wrong(f)
            told.append(str(error.value))
        assert told[0] == told[1] and told[0].startswith("forward() ")
