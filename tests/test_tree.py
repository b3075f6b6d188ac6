from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs

from llama_fn import LLAMA2_7B, random, tree


class Pair(NamedTuple):
    left: object
    right: object


def nested(leaves: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(leaves, lambda t: st.builds(Pair, t, t) | st.lists(t, max_size=3) | st.lists(t, max_size=3).map(
        tuple) | st.dictionaries(st.text("abc", min_size=1), t, max_size=3), max_leaves=8)


trees = nested(st.integers() | st.none())


@given(trees)
def test_map_of_the_identity_is_the_identity(value):
    assert tree.map(lambda x: x, value) == value


@given(trees)
def test_map_of_a_composition_is_the_composition_of_maps(value):
    assert tree.map(lambda x: str(x + 1), value) == tree.map(str, tree.map(lambda x: x + 1, value))


@given(trees)
def test_the_leaves_of_a_map_are_the_map_of_the_leaves(value):
    assert tree.leaves(tree.map(lambda x: x + 1, value)) == [x + 1 for x in tree.leaves(value)]


@given(trees)
def test_unflatten_is_the_inverse_of_flatten(value):
    leaves, structure = tree.flatten(value)
    assert tree.unflatten(leaves, structure) == value
    assert structure == tree.structure(value)


@given(trees)
def test_none_is_no_leaf(value):
    assert None not in tree.leaves(value)
    assert tree.leaves([value, None]) == tree.leaves(value)
    assert tree.map(abs, [value, None])[1] is None
    assert len(tree.paths([value, None])) == len(tree.leaves(value))


@given(trees)
def test_map_takes_corresponding_leaves_of_several_trees(value):
    doubled, tripled = (tree.map(lambda x, n=n: n * x, value) for n in (2, 3))
    assert tree.map(lambda x, y: y - x, value, doubled) == value
    assert tree.map(lambda x, y, z: 2 * y - z, value, doubled, tripled) == value


def test_map_over_trees_of_different_structure_is_an_error():
    for other in ([1], [1, 2, 3], (1, 2), {"a": 1, "b": 2}):
        with pytest.raises(ValueError):
            tree.map(lambda x, y: x, [1, 2], other)


@given(trees)
def test_every_leaf_has_one_path(value):
    paths = tree.paths(value)
    assert list(paths.values()) == tree.leaves(value)
    seen = {}
    tree.map_with_path(lambda path, x: seen.setdefault(path, x), value)
    assert seen == paths


def test_a_path_is_fields_keys_and_indices_joined_by_dots():
    value = Pair([10, {"key": 20}], (None, 30))
    assert tree.paths(value) == {"left.0": 10, "left.1.key": 20, "right.1": 30}
    assert tree.map_with_path(lambda path, x: path, value) == Pair(["left.0", {"key": "left.1.key"}], (None, "right.1"))


@given(nested(st.integers(0, 3).map(torch.ones)).filter(tree.leaves), st.integers(0, 9))
def test_vdot_is_the_dot_product_of_the_trees_as_vectors(value, seed):
    value, other = (random.like(random.key(n), value) for n in (seed, seed + 1))
    one, two = (torch.cat(tree.leaves(x)) for x in (value, other))
    assert float(tree.vdot(value, other)) == pytest.approx(float(one @ two), abs=1e-6)


def test_vdot_is_exact_for_small_floats():
    ones = {"a": torch.full((1000,), 1.01, dtype=torch.bfloat16), "b": torch.ones(()), "c": None}
    assert tree.vdot(ones, ones) == 1000 * float(ones["a"][0]) ** 2 + 1 and tree.vdot(ones, ones).dtype == torch.float32
    assert tree.vdot(torch.ones(3, dtype=torch.float64), torch.ones(3)).dtype == torch.float64


def test_vdot_of_leaves_of_different_shapes_is_an_error():
    with pytest.raises(ValueError, match=r"corresponding leaves must have one shape, got \[3\] and \[3, 1\]"):
        tree.vdot([torch.ones(3)], [torch.ones(3, 1)])


@given(nested(configs() | st.none()))
def test_a_constant_has_no_leaves_and_is_part_of_the_structure(value):
    assert tree.leaves(value) == [] and tree.paths(value) == {}
    assert tree.map(None, value) == value
    assert tree.structure([value, LLAMA2_7B]) != tree.structure([value, None])


def test_a_constant_passes_through_grad_and_vmap():
    value = Pair(torch.arange(3.0), LLAMA2_7B)
    grads = torch.func.grad(lambda value: (value.left ** 2).sum() * value.right.n_layers)(value)
    assert torch.equal(grads.left, 64 * value.left) and grads.right is LLAMA2_7B
    assert torch.equal(torch.vmap(lambda value: value.left * value.right.n_layers)(value), 32 * value.left)
