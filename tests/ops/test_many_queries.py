"""Attention of many queries a row by a kernel in C++: it computes what is written out, but for what 16 bits lose."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Calls, keys, leave_no_number_in_memory, random_params

import llama_fn as lf
from llama_fn.model import attention
from llama_fn.ops import attend as attend_ops
from llama_fn.ops.cpu import attend as cpu_attend
from llama_fn.ops.cpu import build
from llama_fn.ops.cpu import linear as cpu_linear

pytestmark = pytest.mark.skipif(not build.vector_instructions(), reason="this processor has no AVX2")
# Beside the definition in float64: of a weight a pair of bfloat16 keeps 9 bits.
LOST = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def heads_of(key: torch.Tensor, b: int, k: int, g: int, t: int, s: int, h: int, dtype: torch.dtype) -> list:
    """Queries, keys and values in a cache of more slots, and any positions."""
    shapes = (b, t, k, g, h), (b, k, s + 3, h), (b, k, s + 3, h)
    *keys, last = lf.random.split(key, 4)
    queries, *leaves = (lf.random.normal(key, shape, torch.float32).to(dtype)
                        for key, shape in zip(keys, shapes, strict=True))
    positions = lf.random.bits(last, (b, t)) * s >> 32
    return [queries.permute(0, 2, 3, 1, 4), *(leaf[..., :s, :] for leaf in leaves), positions]


def attended(queries, keys, values, positions) -> torch.Tensor:
    """The definition, in float64."""
    return attention.written_out(*(x.double() for x in (queries, keys, values)), positions)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@given(key=keys(), dtype=st.sampled_from(build.DTYPES), b=st.integers(1, 3), k=st.integers(1, 4), g=st.integers(1, 18),
       t=st.integers(1, 70), s=st.integers(1, 150), registers=st.integers(1, 18))
def test_many_queries_attend_to_what_is_written_out(threads, key, dtype, b, k, g, t, s, registers):
    queries, keys, values, positions = heads_of(key, b, k, g, t, s, 8 * registers, dtype)
    exact = attended(queries, keys, values, positions)
    beyond = (torch.arange(s) > positions.amax(-1, keepdim=True))[:, None, :, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        keys, values = (leaf.masked_fill_(beyond, math.nan) for leaf in (keys, values))  # where they lie
        leave_no_number_in_memory()
        y = cpu_attend.many_queries(queries, keys, values, positions)
    assert y.dtype == dtype and y.shape == queries.shape
    assert (y - exact).abs().max() <= LOST[dtype] * max(1, values.nan_to_num().abs().max())


@given(keys(), st.sampled_from([1e-6, 30.0, 1e4, 1e12, 1e30]), st.integers(1, 11))
def test_many_queries_take_scores_of_any_size(key, size, g):
    queries, keys, values, positions = heads_of(key, 2, 3, g, 7, 77, 16, torch.float32)
    exact = attended(size * queries, keys, values, positions)
    y = cpu_attend.many_queries(size * queries, keys, values, positions)
    terms = torch.einsum("bkgth,bksh->bkgts", size * queries.abs(), keys.abs()).max() / 4  # of a score, over sqrt(16)
    assert (y - exact).abs().max() <= (2e-6 + 2**-21 * terms) * values.abs().max()  # a score is off by half of that


def test_many_queries_hear_of_no_slot_whose_score_is_infinitely_small():
    queries, keys, values, _ = heads_of(lf.random.key(4), 2, 3, 5, 4, 93, 24, torch.float32)
    queries, positions = queries.abs(), torch.tensor([[39, 2, 33, 91], [92, 5, 60, 91]], dtype=torch.int32)
    keys[:, 1, :33] = keys[1, 2] = -math.inf
    y, exact = cpu_attend.many_queries(queries, keys, values, positions), attended(queries, keys, values, positions)
    assert (y.isnan() == exact.isnan()).all() and y[1, 2].isnan().all() and y[0, 1, :, 1].isnan().all()
    assert (y - exact).nan_to_num().abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", build.DTYPES)
@pytest.mark.parametrize("slot", [0, 37, 80])
def test_many_queries_make_no_number_of_what_is_none(dtype, slot):
    queries, keys, values, positions = heads_of(lf.random.key(3), 2, 3, 5, 31, 91, 32, dtype)
    positions[1] = positions[1] % 37
    plain, seen = cpu_attend.many_queries(queries, keys, values, positions), slot <= positions
    kept, keys[:, 1, slot, 5] = keys[:, 1, slot, 5].clone(), math.nan
    y, expected = cpu_attend.many_queries(queries, keys, values, positions), torch.zeros_like(plain, dtype=torch.bool)
    expected[:, 1] = seen[:, None, :, None]
    assert (y.isnan() == expected).all() and (y[~expected] == plain[~expected]).all()

    keys[:, 1, slot, 5], values[:, 1, slot, 5] = kept, math.nan  # zero times this is none, as in the definition
    y, expected = cpu_attend.many_queries(queries, keys, values, positions), torch.zeros_like(expected)
    expected[:, 1, :, :, 5] = seen[:, None]
    visible = torch.arange(91)[:, None] <= positions.amax(-1)[:, None, None, None]
    most = attended(queries, keys, values.where(visible, 0), positions).isnan()
    assert (expected <= y.isnan()).all() and (y.isnan() <= most).all() and (y == plain)[~y.isnan()].all()


@given(keys(), st.sampled_from([(), (2,), (2, 3), (1, 8)]), st.sampled_from(build.DTYPES), st.booleans())
def test_by_cpp_many_queries_are_what_is_written_out(key, batch, dtype, cached):
    shapes = (*batch, 2, 5, 7, 16), (*batch, 2, 9 if cached else 7, 16)
    queries, *leaves = (lf.random.normal(k, shape, torch.float32).to(dtype) for k, shape in
                        zip(lf.random.split(key, 3), (*shapes, shapes[1]), strict=True))
    positions = lf.random.bits(key, (*batch, 7)) * 9 >> 32 if cached else None
    y, exact = attend_ops.many_by_cpp(queries, *leaves, positions), attended(queries, *leaves, positions)
    assert y.dtype == dtype and y.shape == exact.shape
    assert (y - exact).abs().max() <= LOST[dtype] * leaves[1].abs().max()


@pytest.mark.parametrize("lie", [lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, -1)[..., ::2],
                                 lambda x: x.movedim(2, 0).contiguous().movedim(0, 2), lambda x: x.double()])
def test_many_queries_read_leaves_however_they_lie(lie):
    queries, keys, values, positions = heads_of(lf.random.key(5), 2, 3, 5, 7, 21, 24, torch.bfloat16)
    plain = cpu_attend.many_queries(queries, keys, values, positions)
    for others in ((lie(keys), values), (keys, lie(values))):
        assert (cpu_attend.many_queries(queries, *others, positions) == plain).all()
    if lie(queries).dtype == queries.dtype:
        assert (cpu_attend.many_queries(lie(queries), keys, values, positions) == plain).all()


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_prompts_step_by_this_kernel_is_the_step(batch):
    config = lf.Config(dim=192, n_layers=1, n_heads=12, n_kv_heads=4, vocab_size=37, hidden_dim=320, max_seq_len=64)
    params = random_params(config, lf.random.key(0), torch.float32)
    tokens = lf.random.bits(lf.random.key(1), (*batch, 50)) * 37 >> 32
    whole, _ = lf.forward(params, tokens)
    calls, cache = Calls(), lf.init_cache(config, batch, max_len=64)
    with pytest.MonkeyPatch.context() as patch, calls:
        patch.setattr(torch.compiler, "_is_compiling_flag", True)
        patch.setattr(cpu_linear, "supports", lambda *_: False)
        first, cache = lf.forward(params, tokens[..., :33], cache)
        second, cache = lf.forward(params, tokens[..., 33:], cache)
        without, _ = lf.forward(params, tokens)
    assert calls.names == 3 * ["attend_many_queries"]
    for logits in (torch.cat((first, second), -2), without):
        assert (logits - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_tracing_knows_the_shape_of_many_heads():
    args = heads_of(lf.random.key(6), 2, 3, 5, 7, 21, 24, torch.bfloat16)
    imagined, y = cpu_attend.many_queries(*(x.to("meta") for x in args)), cpu_attend.many_queries(*args)
    assert (imagined.shape, imagined.stride(), imagined.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize("wrong", [
    {1: (1, 3, 24, 24)}, {1: (2, 2, 24, 24)}, {1: (2, 3, 24, 16)}, {2: (2, 3, 23, 24)}, {2: (2, 3, 24, 16)},
    {3: (2, 6)},
])
def test_many_queries_of_other_leaves_are_refused(wrong):
    args = heads_of(lf.random.key(6), 2, 3, 5, 7, 21, 24, torch.float32)
    shapes = {1: (2, 3, 24, 24), 2: (2, 3, 24, 24), 3: (2, 7)} | wrong
    args = [args[0], *(torch.zeros(shapes[i], dtype=args[i].dtype) for i in (1, 2, 3))]
    with pytest.raises(RuntimeError, match="keys, values and positions of these queries"):
        cpu_attend.many_queries(*args)
