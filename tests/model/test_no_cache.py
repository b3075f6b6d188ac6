"""No cache is a value: what comes out where there was none, and may be handed in again."""

import pytest
import torch
from hypothesis import given
from strategies import models, token_rows

import llama_fn as lf
from llama_fn.model.attention import attention
from llama_fn.model.cache import KeysValues
from llama_fn.model.rope import rotation

NONE = [(), (None,), (lf.NoCache(),)]
PARAMS = lf.init_params(lf.random.key(3), lf.Config(48, 1, 6, 2, 77, 70))
ROWS = token_rows(PARAMS.config, 3, 5)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) < 1e-5


def test_no_cache_is_empty_false_and_a_tree_without_leaves():
    assert lf.NoCache() == () and not lf.NoCache() and lf.tree.leaves(lf.NoCache()) == []
    assert lf.tree.map(torch.sin, (PARAMS.norm, lf.NoCache()))[1] == lf.NoCache()
    assert type(lf.tree.map(torch.sin, lf.NoCache())) is lf.NoCache
    assert lf.init_cache(PARAMS.config, max_len=3)  # a cache is true, an empty one too


@given(models())
def test_without_a_cache_none_comes_out_and_may_go_in_again(params):
    rows = token_rows(params.config, 3, 5)
    for f in (lf.forward, lf.trunk):
        expected, none = f(params, rows)
        assert type(none) is lf.NoCache
        for given_none in NONE:
            x, again = f(params, rows, *given_none)
            assert torch.equal(x, expected) and type(again) is lf.NoCache


@given(models())
def test_vmap_needs_no_out_dims(params):
    rows = token_rows(params.config, 2, 3, 5)
    for f in (lf.forward, lf.trunk):
        expected, _ = f(params, rows)
        once, none = torch.vmap(f, (None, 0))(params, rows[0])
        twice, none_twice = torch.vmap(torch.vmap(f, (None, 0)), (None, 0))(params, rows)
        handed_in, none_again = torch.vmap(f, (None, 0, 0))(params, rows[0], none)
        assert type(none) is type(none_twice) is type(none_again) is lf.NoCache
        for x, y in ((once, expected[0]), (twice, expected), (handed_in, expected[0])):
            assert float((x - y).abs().max()) < 1e-9


@given(models())
def test_a_block_and_its_attention_hand_on_that_there_is_none(params):
    x = lf.random.normal(lf.random.key(1), (3, 5, params.config.dim), torch.float64)
    angles = rotation(torch.arange(5).expand(3, 5), params.config.head_dim, 1e4)
    for none in (None, lf.NoCache()):
        for f in (lf.block, lf.remat(lf.block)):
            assert type(f(params.blocks[0], x, angles, none, None, None, 1e-5)[1]) is lf.NoCache
        assert type(attention(params.blocks[0].attention, x, angles, none, None, None)[1]) is lf.NoCache


def test_with_a_cache_attention_needs_positions_and_slots():
    cache, x = lf.init_cache(PARAMS.config, (3,), max_len=9), torch.ones(3, 5, 48)
    layer, positions, slots = KeysValues(cache.k[0], cache.v[0]), torch.arange(5).expand(3, 5), torch.arange(9)
    angles, weights = rotation(positions, PARAMS.config.head_dim, 1e4), PARAMS.blocks[0].attention
    for some in ((positions, None), (None, slots)):
        with pytest.raises(AssertionError, match="with a cache, positions and slots are given"):
            attention(weights, x, angles, layer, *some)
    assert type(attention(weights, x, angles, layer, positions, slots)[1]) is KeysValues


def test_it_passes_through_grad_as_what_is_not_differentiated():
    def loss(params: lf.Params) -> tuple[torch.Tensor, lf.Cache | lf.NoCache]:
        logits, cache = lf.forward(params, ROWS)
        return logits.square().mean(), cache

    _, aux = torch.func.grad(loss, has_aux=True)(PARAMS)
    assert type(aux) is lf.NoCache
    each, aux = torch.vmap(lambda row: torch.func.grad(
        lambda p: (lf.forward(p, row)[0].sum(), lf.forward(p, row)[1]), has_aux=True)(PARAMS))(ROWS)
    assert type(aux) is lf.NoCache and each.norm.shape == (3, 48)
    _, _, aux = torch.func.jvp(loss, (PARAMS,), (PARAMS,), has_aux=True)
    assert type(aux) is lf.NoCache


def test_a_layer_of_ones_own_sees_it_and_may_return_it():
    def layer(weights, x, rotation, cache, *rest):
        assert type(cache) is lf.NoCache
        return lf.block(weights, x, rotation, cache, *rest)

    assert close(lf.forward(PARAMS, ROWS, layer=layer)[0], lf.forward(PARAMS, ROWS)[0])


def test_a_conversation_begins_without_a_cache(model):
    assert type(lf.Chat().cache) is lf.NoCache
    for cache in (None, lf.NoCache()):
        chat = lf.ask(model, lf.Chat()._replace(cache=cache), "Who?")
        *_, (_, after) = lf.answer(model, chat, key=lf.random.key(0), max_new_tokens=3)
        assert after.cache and after.tokens[:len(chat.tokens)] == chat.tokens


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_as_one_graph_it_comes_out_too(dynamic):
    expected, _ = lf.forward(PARAMS, ROWS)
    mapped = torch.vmap(lf.forward, (None, 0))
    for f, rows in ((lf.forward, ROWS), (mapped, ROWS), (torch.vmap(mapped, (None, 0)), ROWS[None])):
        x, none = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")(PARAMS, rows)
        assert close(x.reshape(expected.shape), expected) and type(none) is lf.NoCache


@pytest.mark.slow
def test_where_there_is_none_nothing_is_donated():
    expected, cache = lf.forward(PARAMS, ROWS)[0], lf.init_cache(PARAMS.config, (3,), max_len=9)
    for step in (lf.jit(lf.forward, donate="cache"), lf.jit_layers()):
        for none in NONE:
            x, again = step(PARAMS, ROWS, *none)
            assert close(x, expected) and type(again) is lf.NoCache
    doubled = lf.jit(lambda x, cache=None: 2 * x, donate="cache")  # none of its results could take a cache's memory
    assert torch.equal(doubled(PARAMS.norm, lf.NoCache()), 2 * PARAMS.norm)
    for step in (lf.jit(lf.forward, donate="cache"), lf.jit_layers()):
        x, again = step(PARAMS, ROWS, lf.tree.map(torch.clone, cache))
        assert close(x, expected) and again.length.tolist() == [5, 5, 5]
