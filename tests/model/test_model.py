"""The laws of `forward` and its cache, on random configs whose axes all differ in size.

Most are tried in float64, where 1e-9 is far above rounding and far below any mistake.
"""

import dataclasses
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import close, direction_like, finite_difference
from strategies import SCALINGS, cache_for, configs, keys, models, random_params, scaled, token_rows

import llama_fn as lf
from llama_fn.model import linear, transformer
from llama_fn.model.attention import written_out
from llama_fn.model.norm import rms_norm
from llama_fn.model.rope import rotate, rotation
from llama_fn.model.rope import scale_frequencies as slowed
from llama_fn.ops import look_up, room
from llama_fn.ops.extent import extent

B, T, S = 5, 7, 13  # rows, tokens, slots


def trees_equal(a, b) -> bool:
    return lf.tree.structure(a) == lf.tree.structure(b) and all(map(torch.equal, lf.tree.leaves(a), lf.tree.leaves(b)))


# --- the whole model against an independent one


@given(models(dtype=torch.float32), st.sampled_from(SCALINGS), st.integers(0, 99))
def test_logits_are_those_of_metas_formulas(params, scaling, seed):
    params = params._replace(config=scaled(params.config, scaling))
    tokens = token_rows(params.config, 40, seed=seed)
    ours, _ = lf.forward(params, tokens)
    theirs = torch.from_numpy(reference.logits(params, tokens)).float()
    assert close(ours, theirs, 1e-4)  # float32 against float64: 1e-5 seen


@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_logits_at_long_positions_are_those_of_metas_formulas(theta, scaling):
    config = scaled(lf.Config(60, 1, 6, 2, 77, 70, rope_theta=theta), scaling)
    params, tokens = random_params(config, lf.random.key(6)), token_rows(config, 2100)
    theirs = torch.from_numpy(reference.logits(params, tokens))
    # A frequency's last bit, in float32, is an angle of 2100 * 2^-24 = 1e-4 at the end: 7e-5 seen in the logits.
    assert close(lf.forward(params, tokens)[0], theirs, 1e-4)


@given(models(), st.integers(1, T - 1))
def test_a_position_beyond_the_trained_context_is_a_position(params, trained):
    long, tokens = params.config, token_rows(params.config, B, T)
    short = params._replace(config=dataclasses.replace(long, max_seq_len=trained))
    expected, _ = lf.forward(params, tokens)
    assert torch.equal(lf.forward(short, tokens)[0], expected)  # without a cache
    assert torch.equal(lf.trunk(short, tokens)[0], lf.trunk(params, tokens)[0])
    cache = lf.init_cache(short.config, (B,), max_len=T, dtype=params.norm.dtype)  # and with one
    first, cache = lf.forward(short, tokens[:, :trained], cache)
    rest, cache = lf.forward(short, tokens[:, trained:], cache)
    assert close(torch.cat((first, rest), 1), expected) and cache.length.tolist() == [T] * B
    assert torch.equal(lf.loss(short, tokens), lf.loss(params, tokens))


# --- the cache


@given(models(), st.integers(0, 99))
def test_decode_equals_full_forward(params, seed):
    tokens = token_rows(params.config, B, T, seed=seed)
    full, none = lf.forward(params, tokens)
    assert none == lf.NoCache() and not none
    cache, pieces = cache_for(params, (B,)), []
    for t in range(T):
        logits, cache = lf.forward(params, tokens[:, t:t + 1], cache)
        pieces.append(logits)
    assert close(torch.cat(pieces, 1), full)
    assert cache.length.tolist() == [T] * B


@given(models(), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_prefill_in_chunks_equals_full(params, chunks):
    tokens = token_rows(params.config, B, sum(chunks))
    full, _ = lf.forward(params, tokens)
    cache, pieces = cache_for(params, (B,), slots=21), []
    for chunk in tokens.split(chunks, 1):
        logits, cache = lf.forward(params, chunk, cache)
        pieces.append(logits)
    assert close(torch.cat(pieces, 1), full)


@given(models(), st.integers(1, T - 1))
def test_the_future_does_not_change_the_past(params, t):
    one, other = token_rows(params.config, T), token_rows(params.config, T, seed=1)
    other[:t] = one[:t]
    other[t] = (one[t] + 1) % params.config.vocab_size
    (a, _), (b, _) = lf.forward(params, one), lf.forward(params, other)
    assert torch.equal(a[:t], b[:t])
    assert (a[t:] - b[t:]).abs().amax(-1).min() > 0  # and the past does change the future


@given(models(), st.integers(0, B - 1))
def test_a_row_does_not_see_its_neighbors(params, row):
    one, other = token_rows(params.config, B, T), token_rows(params.config, B, T, seed=1)
    other[row] = one[row]
    (a, _), (b, _) = lf.forward(params, one), lf.forward(params, other)
    assert torch.equal(a[row], b[row]) and not torch.equal(a, b)


@given(models(), st.lists(st.integers(0, 6), min_size=B, max_size=B), st.sampled_from([1e3, math.nan, math.inf]))
def test_what_lies_beyond_length_does_not_matter(params, lengths, poison):
    _, cache = lf.forward(params, token_rows(params.config, B, 6), cache_for(params, (B,)))
    cache = cache._replace(length=torch.tensor(lengths))
    beyond = torch.arange(S) >= cache.length[:, None]
    dirty = cache._replace(**{name: tuple(x.masked_fill(beyond[:, None, :, None], poison) for x in getattr(cache, name))
                              for name in "kv"})
    new = token_rows(params.config, B, 3, seed=2)
    (a, _), (b, _) = lf.forward(params, new, cache), lf.forward(params, new, dirty)
    assert torch.equal(a, b)


@given(models(), st.lists(st.integers(0, 6), min_size=B, max_size=B))
def test_each_row_continues_at_its_own_length(params, lengths):
    first, new = token_rows(params.config, B, 6), token_rows(params.config, B, 3, seed=2)
    _, cache = lf.forward(params, first, cache_for(params, (B,)))
    logits, after = lf.forward(params, new, cache._replace(length=torch.tensor(lengths)))
    for row, length in enumerate(lengths):
        alone, _ = lf.forward(params, torch.cat([first[row, :length], new[row]]))
        assert close(logits[row], alone[length:])
    assert after.length.tolist() == [length + 3 for length in lengths]


@given(models())
def test_forward_does_not_mutate(params):
    tokens = token_rows(params.config, B, T)
    _, cache = lf.forward(params, tokens, cache_for(params, (B,)))
    before = lf.tree.map(torch.clone, (params, tokens, cache))
    lf.forward(params, tokens[:, :2], cache)
    assert trees_equal(before, (params, tokens, cache))


@given(models(dtype=torch.bfloat16), st.sampled_from([(), (B,), (2, 3)]))
def test_the_cache_keeps_its_tree_shapes_and_dtypes(params, batch):
    cache = cache_for(params, batch)
    logits, after = lf.forward(params, token_rows(params.config, *batch, T), cache)
    assert lf.tree.structure(after) == lf.tree.structure(cache)
    assert [(x.shape, x.dtype) for x in lf.tree.leaves(after)] == [(x.shape, x.dtype) for x in lf.tree.leaves(cache)]
    assert logits.dtype == torch.bfloat16


@given(models())
def test_an_old_cache_can_be_continued_again(params):
    prompt, one, other = (token_rows(params.config, n, seed=n) for n in (4, 3, 5))
    _, cache = lf.forward(params, prompt, cache_for(params))
    first, longer = lf.forward(params, one, cache)
    lf.forward(params, other, cache)
    again, _ = lf.forward(params, one, cache)
    rewound, _ = lf.forward(params, one, longer._replace(length=cache.length))
    assert torch.equal(first, again) and torch.equal(first, rewound)


# --- transforms


@given(models())
def test_vmap_equals_a_loop(params):
    tokens = token_rows(params.config, B, T)
    mapped = torch.vmap(lambda row: lf.forward(params, row)[0])(tokens)
    looped = torch.stack([lf.forward(params, row)[0] for row in tokens])
    batched, _ = lf.forward(params, tokens)
    assert close(mapped, looped) and close(batched, mapped)


@given(models(), st.lists(st.integers(0, 6), min_size=B, max_size=B))
def test_vmap_over_ragged_caches_equals_batched(params, lengths):
    _, cache = lf.forward(params, token_rows(params.config, B, 6), cache_for(params, (B,)))
    cache, new = cache._replace(length=torch.tensor(lengths)), token_rows(params.config, B, 2, seed=3)
    mapped, mapped_cache = torch.vmap(lambda row, kv: lf.forward(params, row, kv))(new, cache)
    batched, batched_cache = lf.forward(params, new, cache)
    assert close(mapped, batched)
    assert all(map(close, lf.tree.leaves(mapped_cache), lf.tree.leaves(batched_cache)))


@given(models())
def test_vmap_over_one_shared_cache_forks_it(params):
    _, cache = lf.forward(params, token_rows(params.config, 6), cache_for(params))
    new = token_rows(params.config, B, 2, seed=3)
    forked, _ = torch.vmap(lf.forward, (None, 0, None))(params, new, cache)
    assert close(forked, torch.stack([lf.forward(params, row, cache)[0] for row in new]))


@given(models())
def test_batch_axes_are_free(params):
    tokens = token_rows(params.config, 2, 3, T)
    nested, _ = lf.forward(params, tokens)
    flat, cache = lf.forward(params, tokens.reshape(6, T), cache_for(params, (6,)))
    nested_again, nested_cache = lf.forward(params, tokens, cache_for(params, (2, 3)))
    assert close(nested.reshape(6, T, -1), flat) and close(nested_again, nested)
    assert close(nested_cache.k[0].reshape(cache.k[0].shape), cache.k[0])


@given(models(max_layers=1))
def test_vmap_grad_equals_a_loop_of_grad(params):
    tokens = token_rows(params.config, 3, T)
    mapped = torch.vmap(torch.func.grad(lf.loss), (None, 0))(params, tokens)
    looped = lf.tree.map(lambda *xs: torch.stack(xs), *[torch.func.grad(lf.loss)(params, row) for row in tokens])
    assert all(map(close, lf.tree.leaves(mapped), lf.tree.leaves(looped)))


@given(models(max_layers=2), keys())
def test_grad_equals_finite_differences(params, key):
    tokens = token_rows(params.config, B, T)
    direction = direction_like(params, key)
    grads = torch.func.grad(lf.loss)(params, tokens)
    slope = sum((g * d).sum() for g, d in zip(lf.tree.leaves(grads), lf.tree.leaves(direction), strict=True))
    assert slope == pytest.approx(finite_difference(lambda p: lf.loss(p, tokens), params, direction).item(), rel=1e-5,
                                  abs=1e-9)


@given(models(max_layers=1), keys())
def test_a_hessian_vector_product_is_its_finite_difference(params, key):
    tokens = token_rows(params.config, B, T)
    direction = direction_like(params, key)
    gradient = torch.func.grad(lambda p: lf.loss(p, tokens))
    forward_over_reverse = torch.func.jvp(gradient, (params,), (direction,))[1]
    reverse_over_reverse = torch.func.vjp(gradient, params)[1](direction)[0]
    expected = finite_difference(gradient, params, direction)
    for product in (forward_over_reverse, reverse_over_reverse):
        assert all(close(a, b, 1e-6) for a, b in zip(lf.tree.leaves(product), lf.tree.leaves(expected), strict=True))
    assert max(x.abs().max() for x in lf.tree.leaves(expected)) > 1e-4  # or all could be zero


@given(models(max_layers=1), keys())
def test_gradients_flow_through_the_cache(params, key):
    _, cache = lf.forward(params, token_rows(params.config, 5), cache_for(params))
    new = token_rows(params.config, 3, seed=2)

    def readout(k):
        return lf.forward(params, new, cache._replace(k=k))[0].square().mean()

    direction = direction_like(cache.k, key)
    grads = torch.func.grad(readout)(cache.k)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    assert slope == pytest.approx(finite_difference(readout, cache.k, direction).item(), rel=1e-5, abs=1e-9)
    assert all(g[:, 5:].abs().max() == 0 and g[:, :5].abs().max() > 0 for g in grads)


# --- the parts


@given(configs(), keys(), st.integers(0, 4000))
def test_rope_keeps_norms_and_depends_on_differences_alone(config, key, shift):
    q, k = lf.random.normal(key, (2, T, 3, config.head_dim), torch.float64)
    angles = [rotation(torch.arange(T) + s, config.head_dim, config.rope_theta) for s in (0, shift)]
    (q0, k0), (q1, k1) = ((rotate(q, a), rotate(k, a)) for a in angles)
    assert close(q0.norm(dim=-1), q.norm(dim=-1), 1e-6)
    products = [torch.einsum("tnh,unh->ntu", a, b) for a, b in ((q0, k0), (q1, k1))]
    assert close(*products, 2e-2)  # float32 angles of up to 4000 radians are off by 4000 * 2^-24 = 2e-4 each
    assert not close(q0[1], q[1], 1e-3)


@given(configs(), st.sampled_from([2.0, 8.0]), st.integers(0, 4000))
def test_linear_scaling_counts_positions_slower(config, factor, position):
    longer, plain = (rotation(torch.tensor([p]), config.head_dim, config.rope_theta, s) for p, s in (
        (int(factor) * position, lf.RopeScaling("linear", factor)), (position, None)))
    assert torch.equal(longer.cos, plain.cos) and torch.equal(longer.sin, plain.sin)


@given(st.floats(1.5, 64), st.floats(0.5, 2), st.floats(2.5, 8), st.integers(32, 10**5))
def test_llama3_scaling_keeps_what_turns_often_and_divides_what_turns_rarely(factor, low, high, context):
    scaling = lf.RopeScaling("llama3", factor, low, high, context)
    before = torch.logspace(0, -8, 99)
    after, turns = slowed(before, scaling), before.double() * context / (2 * math.pi)
    assert torch.equal(after[turns > high * 1.001], before[turns > high * 1.001])
    assert torch.equal(after[turns < low * 0.999], (before / factor)[turns < low * 0.999])
    assert (after.diff() < 0).all() and (after <= before).all() and (after >= before / factor).all()


def test_rope_is_computed_in_float32_whatever_torchs_default():
    expected, before = rotation(torch.arange(9), 8, 1e4), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert trees_equal(rotation(torch.arange(9), 8, 1e4), expected) and expected.cos.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_rope_counts_positions_exactly_whatever_the_dtype():
    angles = rotation(torch.tensor([257]), 4, 1e4)  # in bfloat16, 257 is 256
    assert angles.cos.dtype == torch.float32
    assert angles.cos[0].tolist() == pytest.approx([math.cos(257), math.cos(2.57)], abs=1e-5)
    assert angles.sin[0].tolist() == pytest.approx([math.sin(257), math.sin(2.57)], abs=1e-5)


@given(keys(), st.floats(0.1, 100))
def test_rms_norm_is_scale_invariant(key, scale):
    weight, x = lf.random.normal(key, (11,), torch.float64), lf.random.normal(key, (T, 11), torch.float64)
    assert close(rms_norm(weight, x, 1e-15), rms_norm(weight, scale * x, 1e-15), 1e-8)
    assert close(rms_norm(torch.ones_like(weight), x, 1e-15).square().mean(-1), torch.ones(T, dtype=x.dtype))


def test_rms_norm_squares_in_float32_and_multiplies_the_weight_after_the_cast():
    x, weight = torch.full((1, 4), 300.0, dtype=torch.float16), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    assert rms_norm(weight, x, 1e-5).tolist() == [[1.0, 2.0, 3.0, 4.0]]  # 300^2 is beyond float16
    fine = lf.random.normal(lf.random.key(0), (64, 4)).bfloat16()
    rounded = (fine.float() * torch.rsqrt(fine.float().square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(rms_norm(weight.bfloat16() / 3, fine, 1e-5), rounded * (weight.bfloat16() / 3))


@given(models())
def test_gqa_equals_mha_with_repeated_heads(params):
    config = params.config
    wide = lf.Config(config.dim, config.n_layers, config.n_heads, config.n_heads, config.vocab_size, config.hidden_dim,
                     config.norm_eps, config.rope_theta, config.max_seq_len)

    def repeat(block: lf.Block) -> lf.Block:
        a = block.attention
        flat = {"wq": a.wq.flatten(0, 1)[:, None], "wo": a.wo.flatten(1, 2)[:, :, None],
                "wk": a.wk.repeat_interleave(config.group_size, 0), "wv": a.wv.repeat_interleave(config.group_size, 0)}
        return block._replace(attention=a._replace(**flat))

    tokens = token_rows(config, B, T)
    mha, _ = lf.forward(params._replace(blocks=tuple(map(repeat, params.blocks)), config=wide), tokens)
    assert close(lf.forward(params, tokens)[0], mha)


@given(configs())
def test_half_precision_stays_near_the_exact_model(config):
    params = lf.init_params(lf.random.key(5), config)
    tokens = token_rows(config, T)
    exact, _ = lf.forward(params, tokens)
    for dtype, tolerance in ((torch.bfloat16, 0.15), (torch.float16, 0.02)):  # logits near 1, 8 and 11 bits each
        rough, _ = lf.forward(lf.tree.map(lambda x: x.to(dtype), params), tokens)  # noqa: B023
        assert rough.dtype == dtype and (rough.float() - exact).abs().max() < tolerance


def test_init_has_the_deviations_of_the_abstract_tree():
    config = lf.Config(dim=96, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=301, hidden_dim=170)
    params, abstract = lf.init_params(lf.random.key(0), config), lf.abstract_params(config)
    for (path, x), weight in zip(lf.tree.paths(params).items(), lf.tree.leaves(abstract), strict=True):
        assert x.shape == weight.shape
        if weight.std is None:
            assert (x == 1).all()
        else:
            assert float(x.std()) == pytest.approx(weight.std, rel=0.05), path
    stds = {path.split(".")[-1]: weight.std for path, weight in lf.tree.paths(abstract).items()}
    into_the_residual = 2 / (4 * math.sqrt(96))  # with four layers; with one it is the other's, which is less
    assert stds["wq"] == stds["w_up"] == stds["output"] == math.sqrt(2 / (5 * 96))
    assert stds["wo"] == stds["w_down"] == into_the_residual
    assert lf.abstract_params(dataclasses.replace(config, n_layers=1)).blocks[0].attention.wo.std == stds["wq"]
    other = lf.init_params(lf.random.key(1), config)
    assert not torch.equal(params.embedding, other.embedding)
    assert not torch.equal(params.blocks[0].attention.wq, params.blocks[1].attention.wq)


def test_a_matrix_has_the_axes_that_it_sums_over_and_those_that_it_makes():
    weights = lf.tree.paths(lf.abstract_params(lf.Config(48, 1, 6, 2, 77, 70)))
    axes = {path.split(".")[-1]: (weight.outer, weight.inner) for path, weight in weights.items()}
    assert axes["wq"] == ((2, 3, 8), (48,)) and axes["wk"] == axes["wv"] == ((2, 8), (48,))
    assert axes["wo"] == ((48,), (2, 3, 8)) and axes["w_down"] == ((48,), (70,))
    assert axes["w_gate"] == axes["w_up"] == ((70,), (48,)) and axes["output"] == ((77,), (48,))


def test_the_real_70b_runs_without_a_number():
    params = lf.init_params(lf.random.key(0), lf.Config(48, 1, 6, 2, 77, 70), device="meta")
    logits, _ = lf.forward(params, torch.zeros((B, T), dtype=torch.int64, device="meta"))
    assert logits.shape == (B, T, 77) and logits.is_meta
    abstract = lf.abstract_params(lf.LLAMA2_70B)
    weights = lf.tree.map(lambda w: torch.empty(w.shape, dtype=torch.bfloat16, device="meta"), abstract)
    logits, _ = lf.forward(weights, torch.zeros((2, 3), dtype=torch.int64, device="meta"))
    assert logits.shape == (2, 3, 32000)


def test_a_linear_map_is_its_sums():
    weight, x = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(1, 4, 3)
    y = [[[sum(weight[o, d] * row[d] for d in range(3)) for o in range(2)] for row in rows] for rows in x]
    assert torch.equal(linear.written_out(weight, x), torch.tensor(y))


def test_the_choice_of_a_linear_map_is_by_its_matrix_and_rows(monkeypatch):
    seen, x = [], torch.ones(7, 3, 5)
    weights = [torch.ones(2, 6, 3, 5), torch.ones(2, 3, 5)]
    monkeypatch.setattr(linear, "choose", lambda *given: seen.append(given) or linear.written_out)
    monkeypatch.setattr(linear, "several_linears", lambda *given: seen.append(given))
    assert linear.linear(weights[0], x, inputs=2).shape == (7, 2, 6)
    assert [y.shape for y in linear.linears(weights, x)] == [(7, 3, 2, 6, 3), (7, 3, 2, 3)]
    (matrix, rows, definition), together, *_ = seen
    assert (matrix.shape, rows.shape, definition) == ((12, 15), (7, 15), linear.written_out)
    assert together[0] is weights and together[1] is x


# --- bad input


def test_a_token_outside_the_vocabulary_is_refused():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0))
    with pytest.raises(ValueError, match=r"token 77 is outside the vocabulary of 77 tokens, 0 to 76"):
        lf.forward(params, torch.tensor([3, 77]))
    with pytest.raises(ValueError, match=r"token -1 is outside"):
        lf.forward(params, torch.tensor([3, -1]))
    for rows in (torch.tensor([[3], [77]]), torch.arange(100)[:, None]):  # few and many, mapped and differentiated
        with pytest.raises(ValueError, match=r"token (77|99) is outside"):
            torch.vmap(lf.forward, (None, 0))(params, rows)
        with pytest.raises(ValueError, match=r"token (77|99) is outside"):
            torch.func.grad(lambda params, rows: lf.forward(params, rows)[0].sum())(params, rows)


def test_where_nothing_reads_the_numbers_a_token_outside_is_nan(monkeypatch):
    monkeypatch.setattr(look_up, "unread", lambda x: True)  # as in a graph for a GPU
    weight = torch.arange(6.0).reshape(3, 2)
    rows = transformer.embed(weight, torch.tensor([-1, 0, 1, 2, 3], dtype=torch.int16))
    assert rows[[0, 4]].isnan().all() and torch.equal(rows[1:4], weight)


def test_an_empty_prompt_is_refused():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0))
    with pytest.raises(ValueError, match=r"there are no tokens \(an empty prompt\)"):
        lf.forward(params, torch.zeros((2, 0), dtype=torch.int64))


def test_a_full_cache_is_refused():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0))
    cache = cache_for(params, (2,), slots=5)._replace(length=torch.tensor([1, 3]))
    lf.forward(params, token_rows(params.config, 2, 2), cache)
    with pytest.raises(ValueError, match=r"the cache is full: it has 5 slots, 3 are in use, and 3 more tokens came"):
        lf.forward(params, token_rows(params.config, 2, 3), cache)
    with pytest.raises(ValueError, match="max_len must be at least 1, got 0"):
        lf.init_cache(params.config, max_len=0)


@given(st.lists(st.integers(0, 40), min_size=B, max_size=B), st.integers(1, 9), st.integers(1, 60))
def test_a_step_reads_whole_pages_up_to_its_last_token(lengths, new, slots):
    config, last = lf.Config(48, 1, 6, 2, 77, 70), max(lengths) + new
    cache = lf.init_cache(config, (B,), max_len=slots)._replace(length=torch.tensor(lengths))
    read = room.slots_to_read(cache.k[0], extent(cache.length), new)
    assert read == slots <= last + room.PAGE or (read % room.PAGE == 0 and last <= read < last + room.PAGE)
    assert last < room.slots_for(last) <= last + room.PAGE and room.slots_for(last) % room.PAGE == 1


def test_a_cache_may_be_of_no_rows():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0))
    cache = lf.init_cache(params.config, (0, 3), max_len=5)
    assert cache.length.shape == (0, 3) and cache.k[0].shape == cache.v[0].shape == (0, 3, 2, 5, 8)
    with pytest.raises(ValueError, match="an axis of batch must be at least 0, got -1"):
        lf.init_cache(params.config, (-1,), max_len=5)
    with pytest.raises(ValueError, match="keys and values are of a floating dtype, got torch.int8"):
        lf.init_cache(params.config, max_len=5, dtype=torch.int8)


def test_a_cache_or_config_of_another_model_is_refused():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0))
    deep = random_params(lf.Config(48, 2, 6, 2, 77, 70), lf.random.key(0))
    tokens = token_rows(params.config, 3)
    with pytest.raises(ValueError, match="the cache has keys of 2 layers and values of 2, the weights have 1; make it"):
        lf.forward(params, tokens, cache_for(deep))
    with pytest.raises(ValueError, match="the config says 12 heads on 2 key/value heads of width 4, "):
        lf.forward(params._replace(config=lf.Config(48, 1, 12, 2, 77, 70)), tokens)
    with pytest.raises(ValueError, match="the config says 78 tokens and width 48, the weights 77 and 48"):
        lf.forward(params._replace(config=lf.Config(48, 1, 6, 2, 78, 70)), tokens)
    with pytest.raises(ValueError, match="a cache's length must be at least 0, got -1"):
        lf.forward(params, tokens, cache_for(params)._replace(length=torch.tensor(-1)))


@given(models(max_layers=1), st.booleans())
def test_a_trunk_of_ones_own_computes_all_layers_or_leaves_them(params, able):
    tokens, cache = token_rows(params.config, B, T), cache_for(params, (B,))
    x = torch.ones(B, T, params.config.dim, dtype=params.norm.dtype)
    asked = []

    def own(*given):
        asked.append(given)
        return x if able else None

    logits, after = lf.forward(params, tokens, cache, trunk=own)
    expected = lf.head(params.norm, params.output, x, params.config.norm_eps) if able else lf.forward(params, tokens)[0]
    assert close(logits, expected) and after.length.tolist() == [T] * B
    slots = room.slots_to_read(cache.k[0], extent(cache.length), T)
    assert [(given[:3], given[3]) for given in asked] == [((params, tokens, cache), slots)]


@given(keys(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_attention_is_written_out_in_the_dtype_of_its_queries(key, dtype):
    queries, k, v = (lf.random.normal(each, shape, torch.float64) for each, shape in
                     zip(lf.random.split(key, 3), ((2, 3, T, 8), (2, S, 8), (2, S, 8)), strict=True))
    positions = torch.arange(S - T, S)
    heads = written_out(*(x.to(dtype) for x in (queries, k, v)), positions)
    assert heads.dtype == dtype
    assert (heads - written_out(queries, k, v, positions)).abs().max() < 8 * torch.finfo(dtype).eps


@given(models(max_layers=1), st.sampled_from([torch.int32, torch.int16, torch.int8]))
def test_tokens_may_be_integers_of_any_width(params, dtype):
    tokens = token_rows(params.config, B, T)
    assert torch.equal(lf.forward(params, tokens.to(dtype))[0], lf.forward(params, tokens)[0])
    assert torch.equal(lf.loss(params, tokens.to(dtype)), lf.loss(params, tokens))


def test_wrong_axes_and_dtypes_are_named():
    params = random_params(lf.Config(48, 1, 6, 2, 77, 70), lf.random.key(0))
    with pytest.raises(lf.AxesError, match=r"forward: argument `tokens` should be Int.Tensor, '.b t'., got float32.3."):
        lf.forward(params, torch.zeros(3))
    bad = params._replace(output=params.output[:, :5])
    with pytest.raises(lf.AxesError, match=r"`params.output` should be Float.Tensor, 'v d'., got float64.77, 5.*d=48"):
        lf.forward(bad, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(lf.AxesError, match=r"`cache.k.0` should be"):
        lf.forward(params, torch.zeros((2, 3), dtype=torch.int64), cache_for(params, (3,)))
