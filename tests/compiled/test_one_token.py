"""The kernel of all layers of one token a row: it is `block` after `block`, and what it cannot do it leaves."""

import dataclasses
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Calls, keys, random_params, token_rows
from torch._subclasses import FakeTensorMode

import llama_fn as lf
from llama_fn.bench.transforms import peak_bytes
from llama_fn.compiled import layers, whole_step
from llama_fn.compiled.whole_step import fused_head, fused_trunk
from llama_fn.ops.cpu import build
from llama_fn.ops.slots import Forked

pytestmark = pytest.mark.skipif(not build.vector_instructions(), reason="this processor has no AVX2")
CONFIG = lf.Config(dim=192, n_layers=3, n_heads=12, n_kv_heads=4, vocab_size=37, hidden_dim=320, max_seq_len=64)


def model_of(key: torch.Tensor, dtype: torch.dtype, bits: str | None, config: lf.Config = CONFIG) -> lf.Params:
    params = lf.tree.map(lambda x: x.to(dtype), random_params(config, key, torch.float32))
    return lf.quantize(params, bits) if bits else params


def exact(params: lf.Params, tokens: torch.Tensor, cache: lf.Cache) -> tuple[torch.Tensor, lf.Cache]:
    """The definition, in float64."""
    double = lf.tree.map(lambda x: x.double() if x.is_floating_point() else x, lf.dequantize(params))
    return lf.forward(double, tokens, lf.tree.map(lambda x: x.double() if x.is_floating_point() else x, cache))


def filled(key: torch.Tensor, config: lf.Config, lengths: torch.Tensor, dtype: torch.dtype, room: int) -> lf.Cache:
    cache = lf.init_cache(config, tuple(lengths.shape), max_len=room, dtype=dtype)
    leaves = [lf.random.normal(lf.random.fold_in(key, i), x.shape, torch.float32).to(dtype) for i, x in
              enumerate(cache.k + cache.v)]
    return lf.Cache(tuple(leaves[:config.n_layers]), tuple(leaves[config.n_layers:]), lengths)


@pytest.mark.parametrize("threads", [1, 2, 3])
@given(key=keys(), dtype=st.sampled_from(build.DTYPES), bits=st.sampled_from([None, "int8", "int4"]),
       batch=st.sampled_from([(), (1,), (2,), (7,), (1, 8), (3, 5), (32,)]),
       heads=st.sampled_from([(12, 4), (4, 4), (8, 1)]), width=st.sampled_from([8, 16, 24]),
       kept=st.sampled_from(build.DTYPES))
def test_it_is_block_after_block(threads, key, dtype, bits, batch, heads, width, kept):
    n, k = heads
    if bits:  # 1 to 8 rows of whole groups, with inputs of 16 bits
        width, dtype, batch = 16, torch.float16 if dtype == torch.float32 else dtype, batch if batch != (32,) else (8,)
        batch = batch if math.prod(batch) <= 8 else (3, 2)
    config = lf.Config(dim=n * width, n_layers=2, n_heads=n, n_kv_heads=k, vocab_size=37,
                       hidden_dim=320 if bits else 40, max_seq_len=64)
    params = model_of(key, dtype, bits, config)
    lengths = lf.random.bits(key, batch) * 20 >> 32
    cache, tokens = filled(key, config, lengths, kept, 21), token_rows(config, *batch, 1)
    logits, after = exact(params, tokens, cache)
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch, calls:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        ours, new = lf.jit_layers()(params, tokens, cache)
    assert calls.names == ["decode_layers", "decode_head"]
    unit = max(torch.finfo(dtype).eps, torch.finfo(kept).eps, 2**-15 if bits else 0)
    unit *= 20 if unit < 1e-6 else 4  # seen: 9 of float32, whose own sums count, too, and 2 of 16 bits
    assert ours.dtype == dtype and (ours - logits).abs().max() <= unit * logits.abs().max()
    assert (new.length == lengths + 1).all()
    for mine, old, other in zip(new.k + new.v, cache.k + cache.v, after.k + after.v, strict=True):
        assert mine is old and (mine - other).abs().max() <= unit * other.abs().max()


def names_of(params, tokens, cache, step=None) -> list[str]:
    calls = Calls()
    with calls:
        (step or lf.jit_layers())(params, tokens, cache)
    return [name for name in calls.names if name != "flash"]  # torch's own attention, by our name


def test_it_is_chosen_for_values_of_one_token_a_row_alone(monkeypatch):
    params, tokens = model_of(lf.random.key(0), torch.bfloat16, None), token_rows(CONFIG, 2, 1)
    monkeypatch.setattr(layers, "compiled", lambda f, args, *_: lambda tensors: f(*args))

    def cache(dtype: torch.dtype = torch.bfloat16) -> lf.Cache:
        return lf.init_cache(CONFIG, (2,), max_len=9, dtype=dtype)

    def block_of(change) -> lf.Params:
        return params._replace(blocks=(change(params.blocks[0]), *params.blocks[1:]))

    assert names_of(params, tokens, cache()) == ["decode_layers", "decode_head"]
    assert names_of(params, token_rows(CONFIG, 2, 3), cache()) == ["decode_head"]
    assert "decode_layers" not in names_of(params, tokens, cache(), lf.jit_layers(donate=()))
    assert "decode_layers" not in names_of(params, tokens, cache(torch.float64))
    other = cache()
    other = other._replace(k=tuple(k.mT.contiguous().mT for k in other.k))
    assert "decode_layers" not in names_of(params, tokens, other)
    strided = block_of(lambda b: b._replace(ffn_norm=b.ffn_norm.repeat_interleave(2)[::2]))
    assert "decode_layers" not in names_of(strided, tokens, cache())
    wide = block_of(lambda b: b._replace(feed_forward=lf.tree.map(lambda x: x.float(), b.feed_forward)))
    with pytest.raises(RuntimeError):  # torch's: they are of two dtypes
        names_of(wide, tokens, cache())
    lora = lf.lora.apply(params, lf.lora.init(lf.random.key(1), params, rank=2))
    assert "decode_layers" not in names_of(lora, tokens, cache())
    learned = block_of(lambda b: b._replace(ffn_norm=b.ffn_norm.clone().requires_grad_()))
    assert "decode_layers" not in names_of(learned, tokens, cache())
    grown = lf.tree.map(lambda x: x.clone().requires_grad_(), params)
    assert names_of(grown, tokens, cache()) == []
    with torch.no_grad():
        assert names_of(grown, tokens, cache()) == ["decode_layers", "decode_head"]
    mapped = Calls()
    with mapped:
        torch.vmap(lambda t, c: lf.jit_layers()(params, t, c)[0], (0, 0))(tokens, cache())
    assert {*mapped.names} <= {"flash"}
    monkeypatch.setattr(build, "vector_instructions", lambda: "")
    assert names_of(params, tokens, cache()) == []


def test_scales_that_were_cast_are_not_read_as_they_were():
    params, tokens = model_of(lf.random.key(0), torch.bfloat16, "int8"), token_rows(CONFIG, 2, 1)
    cache, step = lf.init_cache(CONFIG, (2,), max_len=9, dtype=torch.bfloat16), lf.jit_layers()
    assert names_of(params, tokens, cache, step) == ["decode_layers", "decode_head"]
    cast = lf.tree.map(lambda x: x.bfloat16() if x.dtype == torch.float32 else x, params)
    plain, _ = lf.forward(params, tokens, cache)
    calls = Calls()
    with calls:
        y, _ = step(cast, tokens, cache)
    assert not {"decode_layers", "decode_head"} & set(calls.names)
    assert (y - plain).abs().max() <= 0.05 * plain.abs().max()


def test_weights_of_two_kinds_are_left_to_others():
    config = lf.Config(dim=192, n_layers=1, n_heads=12, n_kv_heads=1, vocab_size=37, hidden_dim=320, max_seq_len=64)
    params = model_of(lf.random.key(0), torch.bfloat16, None, config)
    small = lf.quantize(params, "int8").blocks[0].attention
    mixed = params._replace(blocks=(params.blocks[0]._replace(
        attention=small._replace(wk=params.blocks[0].attention.wk)),))
    cache = lf.init_cache(config, max_len=9, dtype=torch.bfloat16)
    assert "decode_layers" not in names_of(mixed, token_rows(config, 1), cache)


def test_layers_of_several_kinds_are_left_to_others():
    params, tokens = model_of(lf.random.key(0), torch.bfloat16, None), token_rows(CONFIG, 1)
    cache, last = lf.init_cache(CONFIG, max_len=9, dtype=torch.bfloat16), params.blocks[-1]
    trunk = fused_trunk()
    assert trunk(params, tokens, cache, 9) is not None
    bytes_, fours = (lf.quantize(params, bits) for bits in ("int8", "int4"))
    for blocks in ((*bytes_.blocks[:-1], fours.blocks[-1]), (*params.blocks[:-1], last._replace(
            attention_norm=last.attention_norm.float(), ffn_norm=last.ffn_norm.float()))):
        assert trunk(params._replace(blocks=blocks), tokens, cache, 9) is None
    assert trunk(params, tokens, cache._replace(k=(*cache.k[:-1], cache.k[-1].float()),
                                                v=(*cache.v[:-1], cache.v[-1].float())), 9) is None
    assert trunk(params, tokens.to("meta"), cache, 9) is None
    assert trunk(params, tokens, cache._replace(length=cache.length.int()), 9) is None
    thin = lf.Config(48, 1, 12, 2, 77, 64)  # heads of four numbers, half a register
    few = lf.init_params(lf.random.key(0), thin, torch.bfloat16)
    assert trunk(few, tokens, lf.init_cache(thin, max_len=9, dtype=torch.bfloat16), 9) is None
    narrow = bytes_.output._replace(values=bytes_.output.values[:, :128].contiguous())
    assert fused_head(params.norm, bytes_.output, torch.ones(1, 192, dtype=torch.bfloat16), 1e-5) is not None
    assert fused_head(params.norm, narrow, torch.ones(1, 192, dtype=torch.bfloat16), 1e-5) is None


def test_frequencies_are_computed_once_a_config_where_they_are_no_imagination(monkeypatch):
    computed, original = [], whole_step.frequencies
    monkeypatch.setattr(whole_step, "frequencies", lambda *what: computed.append(what) or original(*what))
    params, tokens, trunk = model_of(lf.random.key(0), torch.float32, None), token_rows(CONFIG, 1), fused_trunk()
    cache = lf.init_cache(CONFIG, max_len=9)._replace(length=torch.tensor(5))
    with FakeTensorMode():
        checked = whole_step._checked(params, tokens, cache, [params.norm])
    assert checked.accepted and checked.frequencies is None
    computed.clear()
    first = trunk(params, tokens, cache, 9)
    assert torch.equal(trunk(params, tokens, cache, 9), first) and len(computed) == 1
    other = params._replace(config=dataclasses.replace(CONFIG, rope_theta=123.0))
    assert not torch.equal(trunk(other, tokens, cache, 9), first) and len(computed) == 2
    assert torch.equal(trunk(params, tokens, cache, 9), first) and len(computed) == 2


def test_a_trunk_is_without_head():
    params, tokens = model_of(lf.random.key(0), torch.float32, None), token_rows(CONFIG, 2, 1)
    cache, calls = lf.init_cache(CONFIG, (2,), max_len=9), Calls()
    plain, _ = lf.trunk(params, tokens, cache)
    with calls:
        x, after = lf.jit_layers(lf.trunk)(params, tokens, cache)
    assert calls.names == ["decode_layers"] and (x - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert after.k[0] is cache.k[0] and (after.length == 1).all()


def test_it_keeps_no_weight_and_looks_at_weights_alike_once(monkeypatch):
    looks, original = [], whole_step._checked
    monkeypatch.setattr(whole_step, "_checked", lambda *args: looks.append(1) or original(*args))
    monkeypatch.setattr(whole_step, "MAX_KINDS", 3)
    cache, trunk = lf.init_cache(CONFIG, max_len=9, dtype=torch.bfloat16), fused_trunk()
    tokens = token_rows(CONFIG, 1)
    params, other = (model_of(lf.random.key(seed), torch.bfloat16, "int8") for seed in (0, 1))
    for weights in (params, other, params):
        plain, _ = lf.forward(weights, tokens, cache)
        logits = lf.head(weights.norm, weights.output, trunk(weights, tokens, cache, 9), CONFIG.norm_eps)
        assert (logits - plain).abs().max() <= 0.05 * plain.abs().max()
    assert len(looks) == 1
    gone = [weakref.ref(x) for x in lf.tree.leaves(params)]
    del params, weights
    assert all(x() is None for x in gone)
    known = dict(zip(trunk.__code__.co_freevars, trunk.__closure__, strict=True))["known"].cell_contents
    for slots in range(10, 20):
        trunk(other, tokens, lf.init_cache(CONFIG, max_len=slots, dtype=torch.bfloat16), slots)
    assert len(known) == 3


def test_a_weight_that_changed_where_it_lies_is_seen():
    params, tokens = model_of(lf.random.key(0), torch.bfloat16, None), token_rows(CONFIG, 1)
    cache, trunk = lf.init_cache(CONFIG, max_len=9, dtype=torch.bfloat16), fused_trunk()
    first = trunk(params, tokens, cache, 9)
    weight = params.blocks[1].feed_forward.w_up.data
    for other in (torch.ones(3, 192, dtype=torch.bfloat16), torch.ones(320, 192, dtype=torch.float16)):
        params.blocks[1].feed_forward.w_up.data = other
        assert trunk(params, tokens, cache, 9) is None
    params.blocks[1].feed_forward.w_up.data = weight
    assert torch.equal(trunk(params, tokens, cache, 9), first)
    params.blocks[1].feed_forward.w_up.requires_grad_()
    assert trunk(params, tokens, cache, 9) is None
    with torch.no_grad():
        assert torch.equal(trunk(params, tokens, cache, 9), first)
    small = model_of(lf.random.key(0), torch.bfloat16, "int8")
    assert trunk(small, tokens, cache, 9) is not None
    for other in (torch.ones(3), torch.ones(320, dtype=torch.bfloat16), torch.ones(1).expand(320)):
        small.blocks[1].feed_forward.w_up.scale.data = other
        assert trunk(small, tokens, cache, 9) is None
    small.blocks[1].feed_forward.w_up.scale.data = torch.ones(320)
    small.blocks[1].ffn_norm.data = torch.ones(2 * 192, dtype=torch.bfloat16)[::2]
    assert trunk(small, tokens, cache, 9) is None
    params.blocks[1].feed_forward.w_up.data = torch.ones(3, 192, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"params.blocks.1.feed_forward.w_up` should be Float"):
        lf.jit_layers()(params, tokens, cache)


def test_a_position_beyond_the_room_is_refused():
    params = model_of(lf.random.key(0), torch.bfloat16, None)
    cache = lf.init_cache(CONFIG, max_len=9, dtype=torch.bfloat16)
    for position in (-1, 9):
        with pytest.raises(RuntimeError, match=f"the cache has no slot {position}"):
            fused_trunk()(params, token_rows(CONFIG, 1), cache._replace(length=torch.tensor(position)), 9)


def test_a_step_allocates_less_than_a_leaf_and_as_much_at_the_thousandth():
    params, cache = model_of(lf.random.key(0), torch.bfloat16, None), None
    cache, step = lf.init_cache(CONFIG, max_len=1100, dtype=torch.bfloat16), lf.jit_layers()
    leaf, addresses = cache.k[0].nbytes, [x.data_ptr() for x in cache.k + cache.v]
    for t in range(1000):
        _, cache = step(params, token_rows(CONFIG, 1, seed=t % 7), cache)
    assert [x.data_ptr() for x in cache.k + cache.v] == addresses and cache.length == 1000
    assert peak_bytes(lambda: step(params, token_rows(CONFIG, 1), cache)) < leaf


def test_a_cache_that_is_forked_is_none_of_its_own():
    params, tokens = model_of(lf.random.key(0), torch.bfloat16, None), token_rows(CONFIG, 2, 1)
    cache = filled(lf.random.key(1), CONFIG, torch.tensor([4, 4]), torch.bfloat16, 9)
    forked = cache._replace(**{name: tuple(Forked(x[:1, :, :2], x[:, :, 2:]) for x in getattr(cache, name))
                               for name in "kv"})
    assert fused_trunk()(params, tokens, cache, 9) is not None
    assert fused_trunk()(params, tokens, forked, 9) is None
