"""Several documents in a row, each a segment: logits, losses and gradients are those of each document alone."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cache_for, keys, models, random_params, token_rows

import llama_fn as lf

CONFIG = lf.Config(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=17, hidden_dim=20, max_seq_len=64)
LENGTHS = (3, 1, 5, 2)


def packed(params: lf.Params, lengths: list[int], seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor,
                                                                         torch.Tensor]:
    """Documents of these lengths, the row of all, and its segments, whose names follow no order."""
    row = token_rows(params.config, sum(lengths), seed=seed)
    names = [7, -2, 0, 5, 3, 11, 4, 1][:len(lengths)]
    segments = torch.repeat_interleave(torch.tensor(names), torch.tensor(lengths))
    return list(row.split(list(lengths))), row, segments


@given(models(), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_the_logits_of_a_row_are_those_of_its_documents_alone(params, lengths):
    documents, row, segments = packed(params, lengths)
    logits = lf.forward(params, row, segments=segments)[0]
    alone = torch.cat([lf.forward(params, document)[0] for document in documents])
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-9)


@given(models(), keys())
def test_a_segment_may_be_interrupted(params, key):
    segments = lf.random.bits(key, (9,)) % 3
    row = token_rows(params.config, 9)
    logits = lf.forward(params, row, segments=segments)[0]
    for name in segments.unique():
        own = segments == name
        torch.testing.assert_close(logits[own], lf.forward(params, row[own])[0], rtol=0, atol=1e-9)


@given(models(), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans())
def test_the_loss_of_a_row_is_that_of_its_documents(params, lengths, masked):
    lengths = [2, *lengths]
    documents, row, segments = packed(params, lengths)
    mask = token_rows(params.config, len(row), seed=1) % 3 > 0 if masked else torch.ones(len(row), dtype=torch.bool)
    total, count = lf.loss_sum(params, row, mask if masked else None, segments)
    sums = [lf.loss_sum(params, document, own) for document, own in zip(documents, mask.split(lengths), strict=True)
            if len(document) > 1]
    torch.testing.assert_close(total, sum(nats for nats, _ in sums), rtol=1e-9, atol=1e-9)
    assert count == sum(number for _, number in sums)
    mean = lf.loss(params, row, mask if masked else None, segments)
    torch.testing.assert_close(mean, total / count.clamp(min=1))


def summed(params: lf.Params, row, segments, layer=lf.block) -> torch.Tensor:
    return lf.loss_sum(params, row, None, segments, layer=layer)[0]


def of_documents(params: lf.Params, row) -> torch.Tensor:
    return sum(lf.loss_sum(params, document)[0] for document in row.split(LENGTHS) if len(document) > 1)


ROWS = token_rows(CONFIG, 3, sum(LENGTHS))
SEGMENTS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)).expand(3, -1)
GRADIENTS = {
    "grad": lambda f: torch.func.grad(lambda params, rows, *rest: sum(
        f(params, *each) for each in zip(rows, *rest, strict=True))),
    "vmap(grad)": lambda f: torch.vmap(torch.func.grad(f), (None, 0, 0)),
    "vmap(grad), shared segments": lambda f: lambda params, rows, segments: torch.vmap(
        torch.func.grad(f), (None, 0, None))(params, rows, segments[0]),
    "jvp": lambda f: lambda params, *rest: torch.func.jvp(lambda p: torch.vmap(f, (None, 0, 0))(p, *rest), (params,),
                                                           (params,)),
    "forward over reverse": lambda f: lambda params, *rest: torch.func.jvp(
        torch.func.grad(lambda p: f(p, *(x[0] for x in rest))), (params,), (params,)),
    "reverse over reverse": lambda f: lambda params, *rest: torch.func.grad(lambda p: sum(
        g.square().sum() for g in lf.tree.leaves(torch.func.grad(f)(p, *(x[0] for x in rest)))))(params),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("layer", [lf.block, lf.remat(lf.block)], ids=["block", "remat"])
def test_the_gradients_of_a_row_are_those_of_its_documents(name, layer):
    params = random_params(CONFIG, lf.random.key(0))
    one = GRADIENTS[name](partial(summed, layer=layer))(params, ROWS, SEGMENTS)
    other = GRADIENTS[name](lambda p, row, _: of_documents(p, row))(params, ROWS, SEGMENTS)
    for x, y in zip(lf.tree.leaves(one), lf.tree.leaves(other), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [lf.jit, lf.jit_layers])
def test_compiled_the_logits_are_those_of_its_documents_alone(jit):
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    logits = jit(lf.forward, donate=())(params, ROWS, segments=SEGMENTS)[0]
    alone = torch.cat([lf.forward(params, part)[0] for part in ROWS.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_the_gradients_are_those_of_its_documents():
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    grads = lf.jit(torch.func.grad(lambda *args: lf.loss_sum(*args)[0]))(params, ROWS, None, SEGMENTS)
    alone = GRADIENTS["grad"](lambda p, row, _: of_documents(p, row))(params, ROWS, SEGMENTS)
    for x, y in zip(lf.tree.leaves(grads), lf.tree.leaves(alone), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_segments_with_a_cache_are_an_error():
    params = random_params(CONFIG, lf.random.key(0))
    with pytest.raises(ValueError, match="segments divide whole rows, which begin at position 0; call without the"):
        lf.forward(params, ROWS, cache_for(params, (3,)), segments=SEGMENTS)
    no_cache = lf.forward(params, ROWS)[1]
    logits, _ = lf.forward(params, ROWS, no_cache, segments=SEGMENTS)
    assert torch.equal(logits, lf.forward(params, ROWS, segments=SEGMENTS)[0])


def test_segments_of_another_shape_are_an_error():
    with pytest.raises(lf.AxesError, match="segments"):
        lf.forward(random_params(CONFIG, lf.random.key(0)), ROWS, segments=SEGMENTS[:, 1:])
