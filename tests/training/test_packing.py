"""Documents fill rows: every token once whatever the shift, as few rows as a packer by hand, even permutations."""

import itertools
import math

import numpy as np
import pytest
import torch
from chi_square import p_value
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import keys

import llama_fn as lf
from llama_fn.training.packing import MASK, ROUNDS, beginnings, filled, mixed, permuted, rows_of, spans

predictions = st.lists(st.integers(0, 40), min_size=1, max_size=12)
contexts = st.integers(1, 16)
shifts = st.sampled_from([0, MASK]) | st.integers(0, MASK)


@given(predictions, contexts, st.booleans(), shifts)
@example([12, 3], 8, True, 2**31)  # a rest of 4 in two parts has 6 tokens: no room for another 4
def test_the_rows_predict_every_token_once_whatever_the_shift(lengths, context, pack, shift):
    rows = rows_of(np.array(lengths), context, pack)
    begins = np.cumsum([0] + [n + 1 for n in lengths])
    predicted = []
    for first, last in itertools.pairwise(rows.first.tolist()):
        assert last > first and (pack or last == first + 1)
        slots = 0
        for item in range(first, last):
            document = rows.document[item]
            for start, length in spans(int(begins[document]), lengths[document], int(rows.number[item]), context,
                                       shift if pack else 0):
                assert begins[document] <= start and start + length < begins[document + 1] and length > 0
                predicted += range(start + 1, start + length + 1)
                slots += length + 1
        assert 0 < slots <= context + 1
    assert sorted(predicted) == sorted({*range(begins[-1])} - {*begins.tolist()})


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 40))
def test_rows_take_the_longest_item_that_fits_again_and_again(slots, room):
    order, sizes = filled(np.array(slots, np.int64), room)
    assert sorted(order.tolist()) == list(range(len(slots)))
    left, expected = sorted(slots, reverse=True), []
    while left:
        row, space = [], room
        while fits := [x for x in left if x <= space]:
            row.append(fits[0])
            left.remove(fits[0])
            space -= fits[0]
        expected.append(row)
    found = [[slots[i] for i in row] for row in np.split(order, np.cumsum(sizes)[:-1])] if slots else []
    assert sorted(found) == sorted(expected)


def test_a_million_documents_are_packed_at_once():
    lengths = lf.random.randint(lf.random.key(0), (10**6,), 1, 2048).numpy()
    rows = rows_of(lengths, 2048, True)
    assert len(rows.first) - 1 <= 1.01 * math.ceil((lengths + 1).sum() / 2049)


@given(st.integers(1, 30), shifts)
def test_a_long_document_is_cut_at_other_places(context, shift):
    """At every place, as the shifts go from 0 to their end: as many as the rest has tokens, and one more."""
    rest = context // 2 + 1 if context > 1 else 0
    every = [2**32 * i // (rest + 1) + 9 for i in range(rest + 1)]
    assert [spans(5, 3 * context + rest, 1, context, x)[0].start for x in every] == [
        5 + context + i for i in range(rest + 1)]
    assert [spans(5, 3 * context + rest, 0, context, x)[0].length for x in every] == [context] * (rest + 1)


@given(st.integers(1, 200), keys())
def test_a_permutation_goes_to_every_number_once(count, key):
    words = lf.random.bits(key, (ROUNDS,)).tolist()
    assert sorted(permuted(place, count, words) for place in range(count)) == list(range(count))


@pytest.mark.parametrize("count", [2, 3, 5, 64, 65])
def test_every_permutation_of_places_is_as_likely(count):
    """Where one place goes, and where two go together; words as an epoch draws them."""
    words = lf.random.bits(lf.random.key(7), (4000, ROUNDS)).tolist()
    one = torch.bincount(torch.tensor([permuted(count // 2, count, each) for each in words]), minlength=count)
    assert p_value(one, torch.full((count,), 1 / count)) > 1e-4
    pairs = torch.tensor([permuted(0, count, each) * count + permuted(1, count, each) for each in words])
    if count <= 5:
        counts = torch.bincount(pairs, minlength=count**2)[[i for i in range(count**2) if i // count != i % count]]
        assert p_value(counts, torch.full((len(counts),), 1 / len(counts))) > 1e-4


@given(predictions.filter(any), st.integers(0, 60), st.integers(0, MASK))
def test_beginnings_fill_the_space(lengths, space, word):
    found = beginnings(np.array(lengths), space, word)
    assert sum(length + 1 for _, length in found) in (space, max(space - 1, 0))
    assert all(length == lengths[document] for document, length in found[:-1])
    assert all(0 < length <= lengths[document] for document, length in found)


def test_beginnings_are_drawn_evenly():
    drawn = torch.tensor([beginnings(np.array([3, 9, 5]), 4, mixed(word))[0][0] for word in range(6000)])
    assert p_value(torch.bincount(drawn, minlength=3), torch.full((3,), 1 / 3)) > 1e-4
