"""A GPU's kernels: each computes what is written out. Where there is no GPU, Triton's interpreter runs them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import Calls, keys, random_params
from test_linear import plain, weight_of
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import llama_fn as lf
from llama_fn.model import attention as attending
from llama_fn.model import linear, operators
from llama_fn.model.block import block
from llama_fn.model.cache import KeysValues
from llama_fn.model.rope import rotation
from llama_fn.transforms.fused import fuse

pytest.importorskip("triton", reason="there is no triton for this system")
from llama_fn.model import gpu_attention, gpu_row, gpu_sums


def sums(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Of rows "b d", the operator's parts "p b o"."""
    return torch.ops.llama_fn.sums(weights, x, gpu_sums.share(weights, x))


def row(weights: list[torch.Tensor], scales: list[torch.Tensor], x: torch.Tensor, **more) -> torch.Tensor:
    """Of a row "1 d", the operator's outputs "1 o"."""
    return torch.ops.llama_fn.row(weights, scales, x, **more)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # the interpreter has no product of bfloat16 matrices
if DEVICE == "cpu":
    operators.LIBRARY.impl("row", gpu_row.row, "CPU")
    operators.LIBRARY.impl("sums", gpu_sums.sums, "CPU")
    operators.LIBRARY.impl("attention", gpu_attention.attention, "CPU")


@given(keys(), st.lists(st.integers(1, 80), min_size=1, max_size=3), st.integers(1, 700),
       st.sampled_from([2, 17, 33]), st.booleans())
def test_sums_of_several_weights_are_products_summed_in_float32(key, outputs, d, rows, bytes_):
    one, *others = lf.random.split(key, 1 + len(outputs))
    x = lf.random.normal(one, (rows, d), torch.float64).to(HALF).to(DEVICE)
    weights = [lf.random.normal(k, (o, d), torch.float64) for k, o in zip(others, outputs, strict=True)]
    weights = [(40 * w).clamp(-128, 127).to(torch.int8) if bytes_ else w.to(HALF) for w in weights]
    weights = [w.to(DEVICE) for w in weights]
    y = sums(weights, x)
    assert y.dtype == torch.float32 and y.shape[1:] == (rows, sum(outputs)) and y.isfinite().all()
    whole = torch.cat(weights).double()
    exact, terms = (linear.written_out(a, b) for a, b in ((whole, x.double()), (whole.abs(), x.double().abs())))
    assert ((y.double().sum(0) - exact).abs() <= 2e-6 * terms).all()


def test_every_byte_is_the_number_that_it_is():
    numbers = torch.tensor([-128, -127, -65, -64, -2, -1, 0, 1, 2, 63, 64, 126, 127], dtype=torch.int8, device=DEVICE)
    weight = torch.cat([torch.eye(4, dtype=torch.int8, device=DEVICE)[i] * numbers[:, None] for i in range(4)])
    ones = torch.eye(4, dtype=HALF, device=DEVICE)
    every = (numbers[None, :, None] * torch.eye(4, dtype=torch.int8, device=DEVICE)[:, None]).flatten(0, 1).float().mT
    assert (sums([weight], ones).sum(0) == every).all()
    for one, y in zip(ones, every, strict=True):
        assert (row([weight], [], one[None]) == y).all()


@given(keys(), st.sampled_from(["tensor", "int8"]), st.sampled_from([(), (1,), (2, 3)]), st.integers(1, 20))
def test_by_triton_a_map_is_what_is_written_out_and_rounds_once(key, kind, batch, d):
    weight = lf.tree.map(lambda x: x.to(DEVICE), weight_of(kind, key, (7,), (4 * d,), HALF))
    x = lf.random.normal(key, (*batch, 4 * d), torch.float64).to(HALF).to(DEVICE)
    y = linear.by_triton(weight, x)
    exact = linear.written_out(plain(weight), x.double())
    assert y.dtype == HALF and y.shape == exact.shape
    assert ((y - exact).abs() <= 2**-11 * exact.abs() + 2e-6 * linear.written_out(plain(weight).abs(), x.double().abs())
            ).all()


@given(keys(), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 1100), st.booleans(),
       st.sampled_from(["alone", "residual", "gated"]))
def test_a_row_is_the_product_and_what_is_made_of_it(key, outputs, d, bytes_, what):
    one, two, *others = lf.random.split(key, 2 + len(outputs))
    outputs = {"alone": outputs, "residual": outputs[:1], "gated": outputs[:1] * 2}[what]
    x = lf.random.normal(one, (1, d), torch.float64).to(HALF).to(DEVICE)
    weights = [lf.random.normal(k, (o, d), torch.float64) / d**0.5 for k, o in zip(2 * others, outputs, strict=False)]
    if what == "gated":
        weights[1] = weights[0].flip(-1)
    weights = [(40 * w).clamp(-128, 127).to(torch.int8) if bytes_ else w.to(HALF) for w in weights]
    scales = [torch.arange(1, 1 + len(w), device=DEVICE) / 40 + i for i, w in enumerate(weights)] if bytes_ else []
    weights = [w.to(DEVICE) for w in weights]
    wide = [w.double() * (scales[i][:, None] if bytes_ else 1) for i, w in enumerate(weights)]
    ys, terms = ([linear.written_out(f(w), f(x.double())) for w in wide] for f in (lambda w: w, torch.abs))
    error = sum(t * 2e-6 for t in terms) if what == "gated" else 2e-6 * torch.cat(terms, -1)
    if what == "residual":
        before = lf.random.normal(two, ys[0].shape, torch.float64).to(HALF).to(DEVICE)
        y, exact = row(weights, scales, x, residual=before), before + ys[0]
        error += 2**-11 * ys[0].abs()
    elif what == "gated":
        y, exact = row(weights, scales, x, gated=True), F.silu(ys[0]) * ys[1]
        error = (1 + ys[0].abs() + ys[1].abs()) * error + 2**-9 * (ys[0] * ys[1]).abs()
    else:
        y, exact = row(weights, scales, x), torch.cat(ys, -1)
    assert (y.dtype, y.shape) == (HALF, exact.shape)
    assert ((y - exact).abs() <= 2**-11 * exact.abs() + error + 2**-24).all()
    imagined = row([w.to("meta") for w in weights], [s.to("meta") for s in scales], x.to("meta"), gated=what == "gated")
    assert (imagined.shape, imagined.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("bits", [None, "int8"])
def test_in_a_layer_the_products_take_the_gate_and_the_sums_with_them(bits):
    config = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=37, hidden_dim=76, max_seq_len=64)
    params = lf.tree.map(lambda x: x.to(DEVICE), random_params(config, lf.random.key(0), HALF))
    layer = (lf.quantize(params, bits) if bits else params).blocks[0]
    x = lf.random.normal(lf.random.key(1), (1, 1, 48), torch.float32).to(HALF).to(DEVICE)
    cache = lf.init_cache(config, (1,), max_len=9, dtype=HALF, device=DEVICE)
    _, cache = lf.forward(params, torch.tensor([[1, 2, 3]], device=DEVICE), cache)
    place = torch.tensor([[3]], device=DEVICE)
    slots, angles = torch.arange(4, device=DEVICE), rotation(place, 8, 1e4)
    args = (layer, x, angles, KeysValues(cache.k[0], cache.v[0]), place, slots)

    def step(*tensors):
        tensors = iter(tensors)
        return lf.tree.leaves(block(*lf.tree.map(lambda _: next(tensors), args), 1e-5))

    tensors, imagined = lf.tree.leaves(args), FakeTensorMode()
    with pytest.MonkeyPatch.context() as patch, imagined:
        patch.setattr(torch.compiler, "_is_compiling_flag", True)
        patch.setattr(linear, "_for_triton", lambda weight, x: True)
        patch.setattr(attending, "_for_triton", lambda queries: True)
        with torch.no_grad():
            graph = make_fx(step, decomposition_table=select_decomp_table())(*map(imagined.from_tensor, tensors))
        fuse(graph.graph)
    graph.recompile()
    rows = [node for node in graph.graph.nodes if str(node.target) == "llama_fn.row.default"]
    assert [sorted(set(node.kwargs) - {"following"}) for node in rows] == [[], ["residual"], ["gated"], ["residual"]]
    following = [node.kwargs["following"].meta["val"].shape for node in rows if "following" in node.kwargs]
    assert following == [layer.attention.wo.shape, layer.feed_forward.w_gate.shape, layer.feed_forward.w_down.shape]
    for a, b in zip(graph(*tensors), step(*tensors), strict=True):
        assert (a - b).abs().max() <= 2e-3 * b.abs().max()


@pytest.mark.parametrize("f", [
    lambda x, other, w0, w1: row([w1], [], F.silu(row([w0], [], x)) * 2.0),  # a gate by a number
    lambda x, other, w0, w1: row([w1], [], F.silu(row([w0], [], x)) * row([w1], [], x)),  # of two products
    lambda x, other, w0, w1: other.mT.reshape(1, 2, 3).mT + row([w1], [], x).view(1, 3, 2),  # what lies otherwise
    lambda x, other, w0, w1: other[:, :1] + row([w1], [], x),  # for every output the same
    lambda x, other, w0, w1: torch.add(other, row([w1], [], x), alpha=2),
    lambda x, other, w0, w1: other + (y := row([w1], [], x)) * y,
], ids=range(6))
def test_what_is_no_gate_and_no_sum_is_left_alone(f):
    assert fused_words(f) == []


def test_a_product_for_nothing_is_forgotten():
    def f(x, other, w0, w1):
        gate, up = row([w0, w1], [], x).split([6, 6], -1)
        y = F.silu(gate) * up
        used, _ = row([w0], [], y), row([w1], [], y)
        return used

    assert fused_words(f) == ["gated"]


def fused_words(f) -> list[str]:
    """What the products in `f`'s graph do besides, which changes nothing."""
    args = [torch.arange(1, 7, dtype=HALF, device=DEVICE)[None] / 5 + i for i in range(2)]
    args += [torch.arange(36, dtype=HALF, device=DEVICE).view(6, 6) / 40 - i / 2 for i in range(2)]
    imagined = FakeTensorMode()
    with imagined:
        graph = make_fx(f, decomposition_table=select_decomp_table())(*map(imagined.from_tensor, args))
        fuse(graph.graph)
    graph.recompile()
    assert (graph(*args) - f(*args)).abs().max() <= 2e-3 * f(*args).abs().max()
    return [name for node in graph.graph.nodes for name in node.kwargs if name in ("gated", "residual")]


@pytest.mark.parametrize(("g", "many"), [(1, False), (3, False), (3, True)])
@given(key=keys(), batch=st.sampled_from([(), (4,), (1, 4)]), h=st.sampled_from([6, 8]),
       slots=st.sampled_from([530, 70, 33, 32, 31, 1]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_attention_is_what_is_written_out_and_reads_no_slot_beyond(key, batch, g, h, slots, dtype, many):
    a, b, c, d = lf.random.split(key, 4)
    queries = 2 * lf.random.normal(a, (*batch, 2, g, 1, h), torch.float32).to(DEVICE)
    room = [2 * lf.random.normal(n, (*batch, 2, slots + 5, h), torch.float32).to(dtype).to(DEVICE) for n in (b, c)]
    room[0][..., slots * 97 // 100:, :] += (2 * queries[..., 0, :, :]).to(dtype)  # the largest scores come late
    positions = (slots - 1 - (lf.random.bits(d, (*batch, 1)) * min(slots, 40) >> 32)).to(DEVICE)
    beyond = torch.arange(slots + 5, device=DEVICE) > positions[..., None]  # "*b 1 s"
    with_nan = [x.masked_fill(beyond[..., None], math.nan)[..., :slots, :] for x in room]
    keys, values = (x.masked_fill(beyond[..., None], 0)[..., :slots, :].double() for x in room)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_attention, "MANY", 0 if many else gpu_attention.MANY)
        y = attending.by_triton(queries, *with_nan, positions)
    exact = attending.written_out(queries.double(), keys, values, positions)
    assert y.dtype == queries.dtype and (y - exact).abs().max() <= 1e-5 * max(1, exact.abs().max())


@pytest.mark.parametrize(("bits", "batch"), [(None, (5,)), ("int8", ()), ("int4", (7,))])
def test_a_step_by_these_kernels_is_the_step(bits, batch):
    config = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=37, hidden_dim=70, max_seq_len=64)
    params = lf.tree.map(lambda x: x.to(DEVICE), random_params(config, lf.random.key(0), torch.float32))
    params = lf.quantize(params, bits) if bits else params
    tokens = (lf.random.bits(lf.random.key(1), (*batch, 5)) * 37 >> 32).to(DEVICE)
    cache = lf.init_cache(config, batch, max_len=9, device=DEVICE)
    whole, _ = lf.forward(params, tokens, cache)
    _, cache = lf.forward(params, tokens[..., :4], cache)
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch, calls:
        patch.setattr(torch.compiler, "_is_compiling_flag", True)
        patch.setattr(linear, "_for_triton", lambda weight, x: not isinstance(weight, linear.Grouped))
        patch.setattr(attending, "_for_triton", lambda queries: True)
        logits, after = lf.forward(params, tokens[..., 4:], cache)
    product = "sums" if batch else "row"
    assert calls.names == (["attention"] if bits == "int4" else [product, "attention", *[product] * 4])
    assert (logits[..., 0, :] - whole[..., 4, :]).abs().max() <= 2e-4 * whole.abs().max()
    assert (after.length == 5).all()


@pytest.mark.parametrize(("dtype", "rows", "d", "parts"), [
    (HALF, 5, 300, 3), (HALF, 5, 3000, 24), (torch.int8, 5, 3000, 24), (torch.int8, 40, 3000, 24),
    (torch.int8, 5, 301, 3),
])
def test_inputs_are_shared_among_programs_and_tracing_knows(dtype, rows, d, parts):
    weights = [torch.ones(o, d, dtype=dtype, device=DEVICE) for o in (5, 70)]
    x = torch.ones(rows, d, dtype=HALF, device=DEVICE)
    y = sums(weights, x)
    assert y.shape == (parts, rows, 75) and (y.sum(0) == d).all()
    imagined = sums([weight.to("meta") for weight in weights], x.to("meta"))
    assert (imagined.shape, imagined.dtype) == (y.shape, y.dtype)


def test_a_weight_that_begins_within_a_word_is_read_all_the_same():
    x = torch.ones(3, 64, dtype=HALF, device=DEVICE)
    weight = (torch.arange(64 * 9 + 1, device=DEVICE) % 100).to(torch.int8)[1:].reshape(9, 64)
    assert (sums([weight], x).sum(0) == weight.float().sum(-1)).all()
    assert (row([weight], [], x[:1]) == weight.sum(-1)).all()


@pytest.mark.parametrize(("kind", "dtype", "rows", "kernel"), [
    ("tensor", torch.bfloat16, 1, "by_triton"),
    ("tensor", torch.bfloat16, 16, "by_triton"),
    ("tensor", torch.bfloat16, 17, "product"),
    ("tensor", torch.float16, 2, "by_triton"),
    ("tensor", torch.float32, 1, "sum_of_products"),
    ("tensor", torch.float32, 2, "product"),
    ("int8", torch.bfloat16, 64, "by_triton"),
    ("int8", torch.bfloat16, 65, "product"),
    ("int8", torch.float32, 1, "sum_of_products"),
    ("int4", torch.bfloat16, 1, "sum_of_products"),
    ("int4", torch.bfloat16, 2, "product"),
])
def test_these_kernels_are_chosen_in_a_compiled_step_on_a_gpu(monkeypatch, kind, dtype, rows, kernel):
    weight, seen = weight_of(kind, lf.random.key(0), (3,), (64,), dtype), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(rows, 64, dtype=dtype, device="cuda")
        assert linear._kernel(weight, x).__name__ == "product"
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
        assert linear._kernel(weight, x).__name__ == kernel
        if kind == "tensor":
            assert linear._kernel(weight.repeat(1, 2)[:, ::2], x).__name__ != "by_triton"  # it would be copied
        if kind == "int8":  # its scales are read as they lie
            one_for_all = weight._replace(scale=weight.scale[:1].expand(3))
            assert linear._kernel(one_for_all, x).__name__ != "by_triton"
        heads = torch.empty(2, 3, 1, 4, dtype=dtype, device="cuda")
        assert attending._for_triton(heads) and not attending._for_triton(heads.double())
        torch.vmap(lambda row: seen.append(linear._for_triton(weight, row)) or row)(x)
        torch.vmap(lambda one: seen.append(attending._for_triton(one)) or one)(heads)
        assert linear._kernel(weight, x.requires_grad_()).__name__ == "product"
        assert not attending._for_triton(x)
    assert seen == [False, False]
