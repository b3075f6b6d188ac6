"""The kernels in C++: they compute what is written out, but for what inputs of 16 bits lose.

Where the processor has no AVX2 they are not chosen, and of them there is nothing to see.
"""

import math
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Calls, keys, leave_no_number_in_memory, random_params
from test_linear import plain, weight_of

import llama_fn as lf
from llama_fn.model import attention
from llama_fn.model.linear import written_out
from llama_fn.ops import attend as attend_ops
from llama_fn.ops import linear
from llama_fn.ops.cpu import attend as cpu_attend
from llama_fn.ops.cpu import build
from llama_fn.ops.cpu import linear as cpu_linear
from llama_fn.ops.slots import Forked

pytestmark = pytest.mark.skipif(not build.vector_instructions(), reason="this processor has no AVX2")
KINDS = st.sampled_from(["int8", "int4"])


def weights_of(kind: str, key: torch.Tensor, outputs: list[int], d: int) -> list:
    return [weight_of(kind, k, (o,), (d,), torch.float32) for k, o in zip(lf.random.split(key, len(outputs)), outputs,
                                                                          strict=True)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@given(key=keys(), kind=KINDS, outputs=st.lists(st.integers(1, 40), min_size=1, max_size=3), groups=st.integers(1, 21),
       rows=st.integers(1, 8))
def test_integers_sum_what_is_written_out(threads, key, kind, outputs, groups, rows):
    check_integers(threads, key, kind, outputs, groups, rows)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_are_summed_piece_after_piece(kind, rows):
    for threads in (1, 2, 3):
        check_integers(threads, lf.random.key(threads), kind, [211, 90], 150, rows)


def check_integers(threads: int, key: torch.Tensor, kind: str, outputs: list[int], groups: int, rows: int) -> None:
    one, two, three = lf.random.split(key, 3)
    weights = weights_of(kind, one, outputs, 64 * groups)
    x = lf.random.normal(two, (rows, 64 * groups), torch.float32)
    x = x * torch.exp(3 * lf.random.normal(three, (rows, groups), torch.float32)).repeat_interleave(64, -1)
    largest = x.abs().unflatten(-1, (groups, 64)).amax(-1).repeat_interleave(64, -1).double()
    leave_no_number_in_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        ys = cpu_linear.multiply(weights, x)
    for weight, y in zip(weights, ys, strict=True):
        w = plain(weight)
        lost = written_out(w.abs() + plain(weight._replace(values=weight.values * 0)).abs(), largest) * 2**-16
        terms = written_out(w.abs(), x.double().abs())
        assert y.dtype == torch.float32 and y.shape == (rows, len(w))
        assert ((y - written_out(w, x.double())).abs() <= lost + 2e-6 * terms).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@given(key=keys(), dtype=st.sampled_from(build.DTYPES), outputs=st.lists(st.integers(1, 20), min_size=1, max_size=3),
       registers=st.integers(1, 40), rows=st.sampled_from([1, 2, 3]) | st.integers(4, 33))
def test_floats_sum_what_is_written_out(threads, key, dtype, outputs, registers, rows):
    check_floats(threads, key, dtype, outputs, registers, rows)


@pytest.mark.parametrize("dtype", build.DTYPES)
@pytest.mark.parametrize(("outputs", "registers", "rows"), [
    ([101], 129, 4), ([7, 95, 48], 260, 8), ([49, 47], 256, 3), ([143], 300, 9), ([50], 700, 33), ([101, 31], 700, 1),
    ([83], 697, 2), ([300], 8, 3)])
def test_floats_are_summed_piece_after_piece_and_block_after_block_of_inputs(dtype, outputs, registers, rows):
    for threads in (1, 2, 3):
        check_floats(threads, lf.random.key(threads), dtype, outputs, registers, rows)


def test_fewer_threads_than_were_asked_for_compute_all():
    """OpenMP may give fewer; how many at most, it is told before it begins."""
    program = ("import torch, llama_fn as lf; from llama_fn.ops.cpu import linear as cpu_linear;"
               "torch.get_num_threads = lambda: 5;"
               "one, two = lf.random.split(lf.random.key(0)); w = lf.random.normal(one, (47, 64), torch.float32);"
               "x = lf.random.normal(two, (1, 64), torch.float32);"
               "assert (cpu_linear.multiply([w], x)[0] - x @ w.T).abs().max() <= 1e-4")
    limited = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", program], env=limited, check=True, capture_output=True)


def check_floats(threads: int, key: torch.Tensor, dtype: torch.dtype, outputs: list[int], registers: int,
                 rows: int) -> None:
    one, two = lf.random.split(key)
    numbers = lf.random.normal(one, (sum(outputs), 8 * registers), torch.float32).to(dtype)
    x = lf.random.normal(two, (rows, 8 * registers), torch.float32).to(dtype).float()  # as a layer's
    with pytest.MonkeyPatch.context() as patch:
        leave_no_number_in_memory()
        patch.setattr(torch, "get_num_threads", lambda: threads)
        ys = cpu_linear.multiply(numbers.split(outputs), x)
    for weight, y in zip(numbers.double().split(outputs), ys, strict=True):
        terms = written_out(weight.abs(), x.double().abs())
        assert y.dtype == torch.float32 and y.shape == (rows, len(weight))
        assert ((y - written_out(weight, x.double())).abs() <= 2e-6 * terms).all()


@pytest.mark.parametrize("rows", range(1, 9))
def test_the_largest_integers_do_not_overflow(rows):
    signs = torch.where(torch.arange(192) % 2 == 0, -1.0, 1.0)
    bytes_, nibbles = (weight_of(kind, lf.random.key(0), (1,), (192,), torch.float32) for kind in ("int8", "int4"))
    bytes_ = bytes_._replace(values=(127 * signs[None]).to(torch.int8))
    nibbles = nibbles._replace(values=torch.full_like(nibbles.values, 255))
    three, same = 3 * signs, torch.full((192,), 3.0)
    for weight, x in ((bytes_, three), (bytes_, -three), (nibbles, same), (nibbles, -same)):
        y, exact = cpu_linear.multiply([weight], x.expand(rows, 192))[0], written_out(plain(weight), x.double())
        assert ((y - exact).abs() <= 1e-6 * written_out(plain(weight).abs(), x.double().abs())).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none_in_its_row_alone(kind, bad):
    weights, x = weights_of(kind, lf.random.key(1), [7, 2], 640), lf.random.normal(lf.random.key(2), (5, 640))
    x[3, 301], x[4] = bad, 0
    for y, alone in zip(cpu_linear.multiply(weights, x), cpu_linear.multiply(weights, x[:1]), strict=True):
        assert not y[3].isfinite().any() and (y[4] == 0).all()
        assert (y[0] - alone[0]).abs().max() <= 1e-5 * y[0].abs().max()


@given(keys(), st.sampled_from(["tensor", "int8", "int4"]), st.sampled_from([(), (1,), (2, 3), (1, 8)]),
       st.sampled_from([torch.bfloat16, torch.float16]))
def test_by_cpp_a_map_is_what_is_written_out_and_rounds_once(key, kind, batch, dtype):
    weight = weight_of(kind, key, (7,), (192,), dtype)
    x = lf.random.normal(key, (*batch, 192), torch.float64).to(dtype)
    y, exact = linear.by_cpp(weight, x), written_out(plain(weight), x.double())
    terms = written_out(plain(weight).abs(), x.double().abs())
    unit, lost = torch.finfo(dtype).eps / 2, 2e-6 if kind == "tensor" else 1e-4
    assert y.dtype == dtype and y.shape == exact.shape
    assert ((y - exact).abs() <= unit * exact.abs() + lost * terms).all()


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@pytest.mark.parametrize("batch", [(), (7,), (1, 8)])
def test_a_step_by_these_kernels_is_the_step(bits, batch):
    config = lf.Config(dim=192, n_layers=1, n_heads=12, n_kv_heads=4, vocab_size=37, hidden_dim=320, max_seq_len=64)
    params = lf.tree.map(lambda x: x.half(), random_params(config, lf.random.key(0), torch.float32))
    params = lf.quantize(params, bits) if bits else params
    tokens = lf.random.bits(lf.random.key(1), (*batch, 5)) * 37 >> 32
    cache = lf.init_cache(config, batch, max_len=9, dtype=torch.float16)
    whole, _ = lf.forward(params, tokens, cache)
    _, cache = lf.forward(params, tokens[..., :4], cache)
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch, calls:
        patch.setattr(torch.compiler, "_is_compiling_flag", True)
        logits, after = lf.forward(params, tokens[..., 4:], cache)
    named = ["linear_integers"] if bits else ["linear_floats"]
    # queries, keys and values are one call, and so are gate and up
    assert calls.names == named + ["attend_one_query"] + 4 * named
    assert (logits[..., 0, :] - whole[..., 4, :]).abs().max() <= 3e-3 * whole.abs().max()
    assert (after.length == 5).all()


def heads_of(key: torch.Tensor, b: int, k: int, g: int, s: int, h: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries in float32, keys and values in a cache of more slots, and for each row how far it is."""
    shapes = (b, k, g, h), (b, k, s + 3, h), (b, k, s + 3, h)
    *keys, last = lf.random.split(key, 4)
    queries, *leaves = (lf.random.normal(key, shape, torch.float32) for key, shape in zip(keys, shapes, strict=True))
    return [queries, *(leaf.to(dtype)[..., :s, :] for leaf in leaves), lf.random.bits(last, (b,)) * s >> 32]


def attended(queries, keys, values, positions) -> torch.Tensor:
    """The definition, in float64."""
    numbers = (queries[..., None, :], keys, values)
    return attention.written_out(*(x.double() for x in numbers), positions[:, None]).squeeze(-2)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@given(key=keys(), dtype=st.sampled_from(build.DTYPES), b=st.integers(1, 3), k=st.integers(1, 4), g=st.integers(1, 18),
       s=st.integers(1, 150), registers=st.integers(1, 18))
def test_one_query_attends_to_what_is_written_out(threads, key, dtype, b, k, g, s, registers):
    queries, keys, values, positions = heads_of(key, b, k, g, s, 8 * registers, dtype)
    exact = attended(queries, keys, values, positions)
    beyond = (torch.arange(s) > positions[:, None])[:, None, :, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        keys, values = (leaf.masked_fill_(beyond, math.nan) for leaf in (keys, values))  # where they lie
        y = cpu_attend.one_query(queries, keys, values, positions)
    assert y.dtype == torch.float32 and y.shape == queries.shape
    assert (y - exact).abs().max() <= 2e-6 * max(1, exact.abs().max())


@given(keys(), st.sampled_from([1e-6, 30.0, 1e4]), st.integers(1, 11))
def test_one_query_takes_scores_of_any_size(key, size, g):
    queries, keys, values, positions = heads_of(key, 2, 3, g, 77, 16, torch.float32)
    exact = attended(size * queries, keys, values, positions)
    y = cpu_attend.one_query(size * queries, keys, values, positions)
    terms = torch.einsum("bkgh,bksh->bkgs", size * queries.abs(), keys.abs()).max() / 4  # of a score, over sqrt(16)
    assert (y - exact).abs().max() <= (2e-6 + 2**-22 * terms) * values.abs().max()  # a score is off by half of that


def test_one_query_hears_of_no_slot_whose_score_is_infinitely_small():
    queries, keys, values, _ = heads_of(lf.random.key(4), 2, 3, 11, 53, 24, torch.float32)
    queries, positions = queries.abs(), torch.tensor([39, 52], dtype=torch.int32)
    keys[:, 1, :33] = keys[1, 2] = -math.inf
    y, exact = cpu_attend.one_query(queries, keys, values, positions), attended(queries, keys, values, positions)
    assert (y.isnan() == exact.isnan()).all() and y[1, 2].isnan().all()
    assert (y - exact).nan_to_num().abs().max() <= 2e-6


@pytest.mark.parametrize("g", [1, 2, 4, 8, 11])
@pytest.mark.parametrize("slot", [0, 6, 40])
def test_one_query_makes_no_number_of_what_is_none(g, slot):
    queries, keys, values, _ = heads_of(lf.random.key(3), 2, 3, g, 53, 24, torch.bfloat16)
    positions, plain = torch.tensor([39, 52]), cpu_attend.one_query(queries, keys, values, torch.tensor([39, 52]))
    seen = slot <= positions
    for leaf, columns in ((keys, slice(None)), (values, slice(5, 6))):
        kept = leaf[:, 1, slot, 5].clone()
        leaf[:, 1, slot, 5] = math.nan
        y = cpu_attend.one_query(queries, keys, values, positions)
        leaf[:, 1, slot, 5] = kept
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[:, 1, :, columns] = seen[:, None, None]
        assert (y.isnan() == expected).all() and (y[~expected] == plain[~expected]).all()
    queries[1, 2, g - 1, 7] = math.inf
    assert (cpu_attend.one_query(queries, keys, values, positions).isnan().nonzero()[:, :3].unique(dim=0).tolist()
            == [[1, 2, g - 1]])


@given(keys(), st.sampled_from([(), (2,), (2, 3), (1, 8)]), st.sampled_from(build.DTYPES))
def test_by_cpp_attention_is_what_is_written_out_and_rounds_once(key, batch, dtype):
    shapes = (*batch, 2, 5, 1, 16), (*batch, 2, 9, 16), (*batch, 2, 9, 16)
    numbers = [lf.random.normal(k, shape, torch.float32).to(dtype) for k, shape in
               zip(lf.random.split(key, 3), shapes, strict=True)]
    positions = lf.random.bits(key, (*batch, 1)) * 9 >> 32
    y, exact = cpu_attend.by_cpp(*numbers, positions), attention.written_out(*(x.double() for x in numbers), positions)
    assert y.dtype == dtype and y.shape == exact.shape
    assert ((y - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 2e-6).all()


@pytest.mark.parametrize("lie", [lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, -1)[..., ::2],
                                 lambda x: x.movedim(2, 0).contiguous().movedim(0, 2)])
def test_one_query_reads_leaves_however_they_lie(lie):
    queries, keys, values, positions = heads_of(lf.random.key(5), 2, 3, 5, 21, 24, torch.bfloat16)
    plain = cpu_attend.one_query(queries, keys, values, positions)
    for others in ((lie(keys), values), (keys, lie(values))):
        assert (cpu_attend.one_query(lie(queries), *others, positions) == plain).all()


@pytest.mark.parametrize(("t", "own"), [(1, "attend_one_query"), (2, "attend_many_queries"),
                                        (7, "attend_many_queries")])
def test_attentions_kernels_are_chosen_in_a_compiled_step_for_values_alone(monkeypatch, t, own):
    def names(change=lambda *args: args, seen=lambda f, args: f(*args)) -> list[str]:
        queries, keys, values, positions = heads_of(lf.random.key(7), 2, 3, 5, 21, 24, torch.bfloat16)
        queries, positions = queries[..., None, :].expand(2, 3, 5, t, 24), positions[:, None].expand(2, t)
        args = change(queries.bfloat16(), keys, values, positions)
        calls = Calls()
        with calls:
            y = seen(partial(attend_ops.attend, attention.written_out), args)
        assert y.shape == args[0].shape and y.dtype == args[0].dtype
        return [name for name in calls.names if name != "flash"]  # torch's own attention, by our name

    assert names() == []
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    monkeypatch.setattr(build, "vector_instructions", lambda: "AVX2")
    assert names() == [own]
    assert names(lambda q, k, v, p: (q, k, v, p), lambda f, args: torch.vmap(f)(*args)) == []
    assert names(lambda q, k, v, p: (q.requires_grad_(), k, v, p)) == []
    for other in (torch.float64, torch.float32):
        assert names(lambda q, k, v, p, other=other: (q, k.to(other), v, p)) == []
        assert names(lambda q, k, v, p, other=other: (q, k, v.to(other), p)) == []
    assert names(lambda q, k, v, p: (q.double(), k, v, p)) == []
    assert names(lambda q, k, v, p: (q[..., :20], k[..., :20], v[..., :20], p)) == []
    assert names(lambda q, k, v, p: (q, k[..., :t, :], v[..., :t, :], None)) == ["attend_many_queries"]
    assert names(lambda q, k, v, p: (q, *(Forked(x[:1, :, :2], x[..., 2:, :]) for x in (k, v)), p.clamp(2))) == []
    monkeypatch.setattr(build, "vector_instructions", lambda: "")
    assert names() == []
    monkeypatch.setattr(build, "vector_instructions", lambda: "AVX512")
    assert names() == [own]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert names() == []


def test_tracing_knows_the_shape_of_heads():
    args = heads_of(lf.random.key(6), 2, 3, 5, 21, 24, torch.bfloat16)
    imagined, y = cpu_attend.one_query(*(x.to("meta") for x in args)), cpu_attend.one_query(*args)
    assert (imagined.shape, imagined.dtype) == (y.shape, y.dtype)


class InTurn(Executor):
    """One thing after the other, each when it is asked for."""

    def __init__(self, _: int):
        pass

    def submit(self, f, *args, **kwargs):
        done = Future()
        try:
            done.set_result(f(*args, **kwargs))
        except OSError as error:
            done.set_exception(error)
        return done


def test_kernels_that_could_not_be_compiled_are_tried_again(monkeypatch):
    from torch._inductor.codecache import CppCodeCache

    def compiled(source, **kwargs):
        tries.append(source)
        if len(tries) == 1:
            raise OSError("no space left on device")

    tries = []
    build._libraries.cache_clear()
    monkeypatch.setattr(build, "ThreadPoolExecutor", InTurn)
    monkeypatch.setattr(CppCodeCache, "load", compiled)
    with pytest.raises(OSError, match="no space"):
        build.load()
    for library in (build.DECODE, build.PREFILL, build.DECODE):
        build.load(library)
    assert len(tries) == 4 and tries[:2] == tries[2:]
    build._libraries.cache_clear()


@pytest.mark.parametrize("kind", ["tensor", "int8", "int4"])
def test_tracing_knows_its_shape(kind):
    weights, x = weights_of(kind, lf.random.key(3), [7, 2, 5], 128), torch.ones(3, 128)
    imagined = cpu_linear.multiply(lf.tree.map(lambda leaf: leaf.to("meta"), weights), x.to("meta"))
    assert [(y.shape, y.dtype) for y in imagined] == [(y.shape, y.dtype) for y in cpu_linear.multiply(weights, x)]
