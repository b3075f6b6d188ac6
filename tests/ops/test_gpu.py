"""A GPU's kernels: each computes what is written out. Where there is no GPU, Triton's interpreter runs them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Calls, keys, random_params
from test_linear import plain, weight_of
from torch._subclasses import FakeTensorMode

import llama_fn as lf
from llama_fn.compiled import whole_step
from llama_fn.model.attention import written_out as written_attention
from llama_fn.model.linear import written_out
from llama_fn.model.rope import Rotation, frequencies, rotate, rotation
from llama_fn.ops import attend as attending
from llama_fn.ops import linear, operators

pytest.importorskip("triton", reason="there is no triton for this system")
from llama_fn.compiled import gpu_step as gpu_token
from llama_fn.ops.gpu import attend_heads as gpu_heads
from llama_fn.ops.gpu import epilogues as gpu_after
from llama_fn.ops.gpu import flash_decoding as gpu_attention
from llama_fn.ops.gpu import linear as gpu_linear
from llama_fn.ops.gpu import linear_few_rows as few_rows
from llama_fn.ops.gpu import linear_one_row as gpu_row
from llama_fn.ops.gpu.linear_few_rows import Weights
from llama_fn.ops.gpu.linear_one_row import Rotated, row


def split_k(weights: list[torch.Tensor], x: torch.Tensor, split_size: int | None = None) -> torch.Tensor:
    """Of rows "b d", the operator's parts "p b o"."""
    return torch.ops.llama_fn.linear_split_k(weights, x, split_size or few_rows.split_size(weights, x))


def matrices(keys, outputs, d: int, bytes_: bool, size: float = 1) -> tuple[Weights, list[torch.Tensor]]:
    """Random weights "o d", and what they are in float64."""
    values = [size * lf.random.normal(key, (o, d), torch.float64) / d**0.5
              for key, o in zip(keys, outputs, strict=True)]
    values = [((40 / size * w).clamp(-128, 127).to(torch.int8) if bytes_ else w.to(HALF)).to(DEVICE) for w in values]
    scales = [size * (1 + i / 2) * torch.arange(1, 1 + o, device=DEVICE) / 40 / o
              for i, o in enumerate(outputs) if bytes_]
    wide = [w.double() * (scales[i][:, None] if bytes_ else 1) for i, w in enumerate(values)]
    return Weights(values, scales), wide


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # the interpreter has no product of bfloat16 matrices
if DEVICE == "cpu":
    operators.LIBRARY.impl("linear_one_row", gpu_row.row, "CPU")
    operators.LIBRARY.impl("linear_split_k", few_rows.split_k, "CPU")
    operators.LIBRARY.impl("flash_decoding", gpu_attention.flash_decoding, "CPU")


@pytest.mark.parametrize(("rows", "split_size"), [(2, None), (17, None), (33, 512), (2, 512), (2, 1024)])
@settings(max_examples=8)
@given(key=keys(), outputs=st.lists(st.integers(1, 80), min_size=1, max_size=3), d=st.integers(1, 700),
       bytes_=st.booleans())
def test_sums_of_several_weights_are_products_summed_in_float32(rows, split_size, key, outputs, d, bytes_):
    one, *others = lf.random.split(key, 1 + len(outputs))
    x = lf.random.normal(one, (rows, d), torch.float64).to(HALF).to(DEVICE)
    weights = [lf.random.normal(k, (o, d), torch.float64) for k, o in zip(others, outputs, strict=True)]
    weights = [(40 * w).clamp(-128, 127).to(torch.int8) if bytes_ else w.to(HALF) for w in weights]
    weights = [w.to(DEVICE) for w in weights]
    y = split_k(weights, x, split_size)
    assert y.dtype == torch.float32 and y.shape[1:] == (rows, sum(outputs)) and y.isfinite().all()
    whole = torch.cat(weights).double()
    exact, terms = (written_out(a, b) for a, b in ((whole, x.double()), (whole.abs(), x.double().abs())))
    assert ((y.double().sum(0) - exact).abs() <= 2e-6 * terms).all()


def test_every_byte_is_the_number_that_it_is():
    numbers = torch.tensor([-128, -127, -65, -64, -2, -1, 0, 1, 2, 63, 64, 126, 127], dtype=torch.int8, device=DEVICE)
    weight = torch.cat([torch.eye(4, dtype=torch.int8, device=DEVICE)[i] * numbers[:, None] for i in range(4)])
    ones = torch.eye(4, dtype=HALF, device=DEVICE)
    every = (numbers[None, :, None] * torch.eye(4, dtype=torch.int8, device=DEVICE)[:, None]).flatten(0, 1).float().mT
    assert (split_k([weight], ones).sum(0) == every).all()
    for one, y in zip(ones, every, strict=True):
        assert (row([weight], [], one[None]) == y).all()


@given(keys(), st.sampled_from(["tensor", "int8"]), st.sampled_from([(), (1,), (2, 3)]), st.integers(1, 20))
def test_by_triton_a_map_is_what_is_written_out_and_rounds_once(key, kind, batch, d):
    weight = lf.tree.map(lambda x: x.to(DEVICE), weight_of(kind, key, (7,), (4 * d,), HALF))
    x = lf.random.normal(key, (*batch, 4 * d), torch.float64).to(HALF).to(DEVICE)
    y = linear.by_triton(weight, x)
    exact = written_out(plain(weight), x.double())
    assert y.dtype == HALF and y.shape == exact.shape
    assert ((y - exact).abs() <= 2**-11 * exact.abs() + 2e-6 * written_out(plain(weight).abs(), x.double().abs())
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
    ys, terms = ([written_out(f(w), f(x.double())) for w in wide] for f in (lambda w: w, torch.abs))
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
    if what == "alone":
        args = [w.to("meta") for w in weights], [s.to("meta") for s in scales]
        imagined = torch.ops.llama_fn.linear_one_row(*args, x.to("meta"))
        assert (imagined.shape, imagined.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("rows", [1, 3])
@settings(max_examples=8)
@given(key=keys(), k=st.integers(1, 3), g=st.integers(1, 4), pairs=st.integers(1, 5), d=st.integers(1, 600),
       bytes_=st.booleans())
def test_queries_and_keys_are_turned_and_keys_and_values_kept(rows, key, k, g, pairs, d, bytes_):
    one, two, three, *others = lf.random.split(key, 6)
    h, x = 2 * pairs, lf.random.normal(one, (rows, d), torch.float64).to(HALF).to(DEVICE)
    weights, wide = matrices(others, (k * g * h, k * h, k * h), d, bytes_)
    slots = (lf.random.bits(one, (rows,)) * 7 >> 32).to(DEVICE)
    angles = [part.contiguous() for part in rotation(slots + 3, h, 1e4)]
    leaves = [lf.random.normal(n, (rows, k, 7, h), torch.float32).to(HALF).to(DEVICE) for n in (two, three)]
    after, every = [leaf.clone() for leaf in leaves], torch.arange(rows, device=DEVICE)
    queries, keys_, values = (written_out(w, x.double()).to(HALF).view(rows, -1, h) for w in wide)
    turn = Rotation(*(part[:, None] for part in angles))
    queries, keys_ = (rotate(part[:, None], turn)[:, 0] for part in (queries, keys_))
    after[0][every, :, slots], after[1][every, :, slots] = keys_, values
    y = gpu_after.rotated(weights, x, Rotated(*angles, *leaves, slots), None)
    for ours, other in zip((y.view_as(queries), *leaves), (queries, *after), strict=True):
        assert ours.dtype == HALF and (ours - other).abs().max() <= 2e-3 * max(1, other.abs().max())
    leaves[0][every, :, slots], leaves[1][every, :, slots] = keys_, values
    assert (leaves[0] == after[0]).all() and (leaves[1] == after[1]).all()  # no other slot was written to


@pytest.mark.parametrize("slots", [70, 33, 32, 7])
@settings(max_examples=4)
@given(key=keys(), rows=st.integers(2, 4), k=st.integers(1, 3), pairs=st.integers(1, 5), d=st.integers(1, 600),
       bytes_=st.booleans())
def test_a_head_is_turned_kept_and_attended_to_and_reads_no_slot_beyond(slots, key, rows, k, pairs, d, bytes_):
    one, two, three, *others = lf.random.split(key, 6)
    h, x = 2 * pairs, lf.random.normal(one, (rows, d), torch.float64).to(HALF).to(DEVICE)
    weights, wide = matrices(others, 3 * [k * h], d, bytes_, size=2)
    positions = slots + 2 - (lf.random.bits(two, (rows,)) * min(slots + 3, 40) >> 32).to(DEVICE)  # two are beyond
    angles = [part.contiguous() for part in rotation(positions + 3, h, 1e4)]
    leaves = [lf.random.normal(n, (rows, k, slots + 1, h), torch.float32).to(HALF).to(DEVICE) for n in (two, three)]
    queries, *own = (written_out(w, x.double()).to(HALF).view(rows, 1, k, h) for w in wide)
    turn = Rotation(*(part[:, None] for part in angles))
    queries, own[0] = rotate(queries, turn), rotate(own[0], turn)
    ours = torch.arange(slots + 1, device=DEVICE) == positions[:, None]
    beyond = torch.arange(slots + 1, device=DEVICE) >= positions[:, None]
    leaves = [leaf.masked_fill(beyond[:, None, :, None], math.nan) for leaf in leaves]
    after = [torch.where(ours[:, None, :, None], new[:, 0, :, None], leaf)
             for new, leaf in zip(own, leaves, strict=True)]
    y = gpu_heads.attended(weights, x, Rotated(*angles, *leaves, positions), slots)
    exact = written_attention(queries[:, 0, :, None, None].double(), *(leaf[:, :, :slots].nan_to_num().double()
                                  for leaf in after), positions[:, None])[..., 0, 0, :]
    assert y.dtype == HALF and (y - exact).abs().max() <= 4e-3 * max(1, exact.abs().max())
    for leaf, other in zip(leaves, after, strict=True):  # no other slot was written to
        assert (leaf.isnan() == other.isnan()).all() and (
            leaf - other).nan_to_num().abs().max() <= 2e-3 * max(1, other.nan_to_num().abs().max())


@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize("which", [0, 1])
def test_a_head_of_a_query_or_key_that_is_none_says_none(which, position):
    one, *others = lf.random.split(lf.random.key(7), 4)
    x = lf.random.normal(one, (2, 12), torch.float32).to(HALF).to(DEVICE)
    weights = [lf.random.normal(n, (24, 12), torch.float32).to(HALF).to(DEVICE) for n in others]
    weights[which][0, 0] = math.nan
    positions = torch.full((2,), position, device=DEVICE)
    angles = [part.contiguous() for part in rotation(positions, 8, 1e4)]
    leaves = [torch.zeros((2, 3, 7, 8), dtype=HALF, device=DEVICE) for _ in range(2)]
    y = gpu_heads.attended(Weights(weights, []), x, Rotated(*angles, *leaves, positions), 7)
    assert y[:, 0].isnan().all() and y[:, 1:].isfinite().all()


@given(keys(), st.integers(1, 150), st.integers(1, 700), st.sampled_from([2, 17]), st.booleans(),
       st.sampled_from([128, 512]))
def test_gated_sums_are_the_gate_of_products(key, o, d, rows, bytes_, unit):
    one, *others = lf.random.split(key, 3)
    x = lf.random.normal(one, (rows, d), torch.float64).to(HALF).to(DEVICE)
    weights, wide = matrices(others, [o, o], d, bytes_)
    gate, up = (written_out(w, x.double()) for w in wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "split_size", lambda weights, x: -(-x.shape[1] // unit) * unit)
        y = few_rows.gated_product(weights, x)
    exact = F.silu(gate) * up
    assert (y.dtype, y.shape) == (HALF, exact.shape)
    assert ((y - exact).abs() <= 2**-11 * 4.2 * (gate * up).abs() + 2e-5).all()  # two factors, silu, and the product


@pytest.mark.parametrize("many", [2, 264])
@pytest.mark.parametrize("batch", [(), (1, 1), (3,)])
@settings(max_examples=2)
@given(key=keys(), heads=st.sampled_from([(6, 2), (4, 4), (5, 1)]), width=st.sampled_from([6, 8]),
       hidden=st.sampled_from([33, 76]), bits=st.sampled_from([None, "int8"]))
def test_all_layers_of_a_token_are_block_after_block(many, batch, key, heads, width, hidden, bits):
    n, k = heads if many > 2 else (4, 4)
    config = lf.Config(dim=n * width, n_layers=2, n_heads=n, n_kv_heads=k, vocab_size=37, hidden_dim=hidden,
                       max_seq_len=64)
    params = lf.tree.map(lambda x: x.to(HALF), random_params(config, key, torch.float32))
    params = lf.tree.map(lambda x: x.to(DEVICE), lf.quantize(params, bits) if bits else params)
    noise = lf.tree.map(lambda x: x.to(HALF).to(DEVICE) if x.ndim > len(batch) else x.to(DEVICE), lf.Cache(*(tuple(
        lf.random.normal(lf.random.fold_in(key, i), (*batch, k, 43, width), torch.float32) for i in range(2))
        for _ in "kv"), lf.random.bits(key, batch) * 41 >> 32))
    tokens = (lf.random.bits(key, (*batch, 1)) * 37 >> 32).to(DEVICE)
    wide = lf.tree.map(lambda x: x.double() if x.is_floating_point() else x, (lf.dequantize(params), noise))
    exact, after = lf.trunk(wide[0], tokens, wide[1])
    apart = noise._replace(length=torch.stack((noise.length, noise.length + 1), -1)[..., 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_token, "MANY_HEADS", many)
        angles = frequencies(width, config.rope_theta, None, tokens.device)
        y = gpu_token.fused_trunk(params, torch.stack((tokens, tokens + 1), -1)[..., 0], apart, 41, angles)
    assert y.dtype == HALF and (y - exact).abs().max() <= 8e-3 * exact.abs().max()
    for ours, other in zip(noise.k + noise.v, after.k + after.v, strict=True):
        assert (ours - other).abs().max() <= 4e-3 * other.abs().max()


@pytest.mark.parametrize("token", [-1, 37])
def test_a_token_outside_the_vocabulary_is_nan(token):
    config = lf.Config(dim=12, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=37, hidden_dim=8, max_seq_len=64)
    params = lf.tree.map(lambda x: x.to(HALF).to(DEVICE), random_params(config, lf.random.key(0), torch.float32))
    tokens = torch.tensor([3, token, 5], device=DEVICE)
    x, *_ = gpu_token.begin(params, tokens, torch.zeros_like(tokens), torch.ones(3, device=DEVICE))
    assert (x[[0, 2]] == params.embedding[[3, 5]]).all() and x[1].isnan().all()


def test_few_rows_of_16_bits_on_a_gpu_are_for_these_kernels():
    config = lf.Config(dim=12, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=37, hidden_dim=8, max_seq_len=64)
    params = random_params(config, lf.random.key(0), torch.float32)

    def takes(params, batch=(1,), kept=torch.bfloat16, change=lambda x: x):
        with FakeTensorMode(allow_non_fake_inputs=True):
            params = lf.tree.map(lambda x: change(torch.empty(x.shape, dtype=x.dtype, device="cuda")), params)
            cache = lf.init_cache(config, batch, max_len=9, dtype=kept, device="cuda")
            return whole_step._accepted(params.blocks[0], params.embedding, torch.Size(batch),
                                        cache.k[0], cache.v[0])

    half = lf.tree.map(lambda x: x.bfloat16(), params)
    assert takes(half) and takes(half, ()) and takes(lf.quantize(half, "int8"), (8, 8)) and takes(half, (16,))
    assert not takes(half, (17,)) and not takes(params, kept=torch.float32) and not takes(half, kept=torch.float16)
    assert not takes(lf.quantize(half, "int8"), (65,)) and not takes(lf.quantize(half, "int4"))
    assert not takes(half._replace(embedding=params.embedding))
    assert not takes(half, change=lambda x: x.as_strided(x.shape, (1,) * x.ndim) if x.ndim > 2 else x)


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
        patch.setattr(gpu_attention, "MANY_SLOTS", 0 if many else gpu_attention.MANY_SLOTS)
        y = attending.by_triton(queries, *with_nan, positions)
    exact = written_attention(queries.double(), keys, values, positions)
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
        patch.setattr(gpu_linear, "accepts", lambda weight, x: not isinstance(weight, linear.Grouped))
        by_triton = linear.Implementation(linear.by_triton, lambda weight, x: not isinstance(weight, linear.Grouped))
        patch.setattr(linear, "TABLE", (by_triton, *linear.TABLE))
        patch.setattr(attending, "TABLE", (attending.Implementation(attending.by_triton, lambda *args: True),))
        logits, after = lf.forward(params, tokens[..., 4:], cache)
    product = "linear_split_k" if batch else "linear_one_row"
    assert calls.names == (["flash_decoding"] if bits == "int4" else [product, "flash_decoding", *[product] * 4])
    assert (logits[..., 0, :] - whole[..., 4, :]).abs().max() <= 2e-4 * whole.abs().max()
    assert (after.length == 5).all()


@pytest.mark.parametrize(("dtype", "rows", "d", "parts"), [
    (HALF, 5, 300, 3), (HALF, 5, 3000, 24), (torch.int8, 5, 3000, 24), (torch.int8, 40, 3000, 24),
    (torch.int8, 5, 301, 3),
])
def test_inputs_are_shared_among_programs_and_tracing_knows(dtype, rows, d, parts):
    weights = [torch.ones(o, d, dtype=dtype, device=DEVICE) for o in (5, 70)]
    x = torch.ones(rows, d, dtype=HALF, device=DEVICE)
    y = split_k(weights, x)
    assert y.shape == (parts, rows, 75) and (y.sum(0) == d).all()
    imagined = split_k([weight.to("meta") for weight in weights], x.to("meta"))
    assert (imagined.shape, imagined.dtype) == (y.shape, y.dtype)


def test_a_weight_that_begins_within_a_word_is_read_all_the_same():
    x = torch.ones(3, 64, dtype=HALF, device=DEVICE)
    weight = (torch.arange(64 * 9 + 1, device=DEVICE) % 100).to(torch.int8)[1:].reshape(9, 64)
    assert (split_k([weight], x).sum(0) == weight.float().sum(-1)).all()
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
        assert linear.choose(weight, x, written_out).__name__ == "product"
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
        assert linear.choose(weight, x, written_out).__name__ == kernel
        if kind == "tensor":
            strided = weight.repeat(1, 2)[:, ::2]  # it would be copied
            assert linear.choose(strided, x, written_out).__name__ != "by_triton"
        if kind == "int8":  # its scales are read as they lie
            one_for_all = weight._replace(scale=weight.scale[:1].expand(3))
            assert linear.choose(one_for_all, x, written_out).__name__ != "by_triton"
        heads = torch.empty(2, 3, 1, 4, dtype=dtype, device="cuda")
        slots, places = torch.empty(2, 9, 4, dtype=dtype, device="cuda"), torch.zeros(1, dtype=torch.int64)

        def takes(queries: torch.Tensor) -> bool:
            return attending._for_triton(queries, slots, slots, places)

        assert takes(heads) and not takes(heads.double())
        torch.vmap(lambda row: seen.append(gpu_linear.accepts(weight, row)) or row)(x)
        torch.vmap(lambda one: seen.append(takes(one)) or one)(heads)
        assert linear.choose(weight, x.requires_grad_(), written_out).__name__ == "product"
        assert not takes(heads.requires_grad_())
    assert seen == [False, False]
