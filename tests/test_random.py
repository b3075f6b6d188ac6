import itertools
import json
from pathlib import Path

import pytest
import torch
from chi_square import p_value
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys
from torch import Tensor

from llama_fn import random, tree

JAX = json.loads((Path(__file__).parent / "data" / "jax_random.json").read_text())["seeds"]
SEEDS = [seed for seed in JAX if seed != "x64"]
ONES = 0xFFFFFFFF

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def assert_close(ours: Tensor, jax: list, ulps: int = 0) -> None:
    """Equal to within `ulps` units in the last place, of 1 where the number is smaller than 1."""
    theirs = torch.tensor(jax, dtype=torch.float64)
    assert ours.shape == theirs.shape
    tolerance = ulps * torch.finfo(ours.dtype).eps
    assert ((ours.double() - theirs).abs() <= tolerance * theirs.abs().clamp(min=1)).all(), ours.double() - theirs


@pytest.mark.parametrize("key, counter, words", [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
])
def test_threefry_gives_the_known_answers_of_its_authors(key, counter, words):
    # Salmon et al. 2011: the file kat_vectors of Random123, threefry2x32, 20 rounds.
    out = random.threefry2x32(torch.tensor(key), *(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in out) == words


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_and_bits_are_those_of_jax(seed):
    jax, key = JAX[seed], random.key(int(seed))
    assert key.tolist() == jax["key"]
    assert random.split(key, 5).tolist() == jax["split"]
    assert random.split(key, (2, 3)).tolist() == jax["split_2x3"]
    assert random.split(key).tolist() == jax["split"][:2]
    for data, child in jax["fold_in"].items():
        assert random.fold_in(key, int(data)).tolist() == child
        assert random.fold_in(key, torch.tensor(int(data))).tolist() == child
    assert random.bits(key).item() == jax["scalar_bits"]
    assert random.bits(key, (3, 4)).tolist() == jax["bits"]
    assert random.bits(key, (6,), 8).tolist() == jax["bits8"]
    assert random.bits(key, (6,), 16).tolist() == jax["bits16"]


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_are_those_of_jax(seed):
    jax, key = JAX[seed], random.key(int(seed))
    assert_close(random.uniform(key, (2, 3)), jax["uniform"])
    assert_close(random.uniform(key, (5,), torch.bfloat16), jax["uniform_bfloat16"])
    assert_close(random.uniform(key, (5,), torch.float16), jax["uniform_float16"])
    # XLA rounds once after u * 9.5 - 2.5; we round u * 9.5 < 16 too, by up to half a unit there: 4 units at 1.
    assert_close(random.uniform(key, (4,), minval=-2.5, maxval=7.0), jax["uniform_range"], ulps=4)
    # XLA has other polynomials for erfinv and the logarithm: the results differ by up to 1.5 units.
    assert_close(random.normal(key, (2, 5)), jax["normal"], ulps=2)
    assert_close(random.gumbel(key, (7,)), jax["gumbel"], ulps=2)
    assert random.rademacher(key, (2, 5)).tolist() == jax["rademacher"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_tree_is_that_of_optax(seed):
    optax = JAX[seed]["optax_random_like"]  # made with Optax 0.2.8
    ours = random.like(random.key(int(seed)), {"b": torch.zeros(2), "w": (torch.zeros(2, 3),)}, random.uniform)
    assert_close(ours["b"], optax["b"])
    assert_close(ours["w"][0], optax["w"][0])


@given(keys())
def test_a_random_tree_has_the_shapes_and_dtypes_of_another_and_draws_of_its_own(key):
    four = torch.zeros(4, dtype=torch.float64)
    value = [four, four, (torch.zeros(3, 2).bfloat16(), None)]
    for draw in (random.normal, random.uniform, random.rademacher):
        ours = random.like(key, value, draw)
        assert [(x.shape, x.dtype) for x in tree.leaves(ours)] == [(x.shape, x.dtype) for x in tree.leaves(value)]
        assert tree.structure(ours) == tree.structure(value)
    one, other, _ = random.like(key, value)
    assert not torch.equal(one, other)
    assert torch.equal(one, random.normal(random.split(key, 3)[0], (4,), torch.float64))


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_those_of_jax(seed):
    jax, key = JAX[seed], random.key(int(seed))
    logits = torch.arange(24, dtype=torch.float32).reshape(4, 6).sin() * 3
    assert random.categorical(key, logits).tolist() == jax["categorical"]
    assert random.categorical(key, logits, axis=0).tolist() == jax["categorical_axis0"]
    assert random.categorical(key, logits, shape=(3, 4)).tolist() == jax["categorical_draws"]


@pytest.mark.parametrize("seed", SEEDS)
def test_integers_are_those_of_jax(seed):
    for case in JAX[seed]["randint"]:
        dtype, shape = getattr(torch, case["dtype"]), torch.tensor(case["values"]).shape
        drawn = random.randint(random.key(int(seed)), shape, case["minval"], case["maxval"], dtype)
        assert drawn.dtype == dtype and drawn.tolist() == case["values"], case
    assert random.randint(random.key(int(seed)), (), 0, 9).dtype == torch.int32


def test_integers_of_64_bits_and_beyond_the_dtype_are_those_of_jax():
    jax = JAX["x64"]
    for case in jax["randint"] + jax["randint32"]:
        dtype = getattr(torch, case["dtype"])
        drawn = random.randint(random.key(jax["seed"]), (7,), case["minval"], case["maxval"], dtype)
        assert drawn.dtype == dtype and drawn.tolist() == case["values"], case
    half = torch.full((9,), 0.5, dtype=torch.float64)
    assert random.bernoulli(random.key(jax["seed"]), half).tolist() == jax["bernoulli_float64"]


@pytest.mark.parametrize("seed", SEEDS)
def test_permutations_are_those_of_jax(seed):
    jax, key, x = JAX[seed], random.key(int(seed)), torch.arange(24.0).reshape(4, 6)
    for count, order in jax["permutation"].items():
        assert random.permutation(key, int(count)).tolist() == order
    many = random.permutation(key, 2000)  # sorted three times, 40 are sorted once
    assert int((many * torch.arange(2000)).sum()) == jax["permutation_2000_sum"]
    assert random.permutation(key, x).tolist() == jax["permutation_rows"]
    assert random.permutation(key, x, 1).tolist() == jax["permutation_columns"]
    assert random.permutation(key, x, axis=-1).tolist() == jax["permutation_last"]
    assert random.permutation(key, x, 1, independent=True).tolist() == jax["permutation_independent"]
    assert random.permutation(key, x, independent=True).tolist() == jax["permutation_independent_rows"]


@pytest.mark.parametrize("seed", SEEDS)
def test_true_and_false_are_those_of_jax(seed):
    jax, key, each = JAX[seed], random.key(int(seed)), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    assert random.bernoulli(key, 0.3, (3, 5)).tolist() == jax["bernoulli"]
    assert random.bernoulli(key).tolist() == jax["bernoulli_scalar"]
    assert random.bernoulli(key, each).tolist() == jax["bernoulli_each"]
    assert random.bernoulli(key, each, (3, 5)).tolist() == jax["bernoulli_broadcast"]
    for dtype in ("bfloat16", "float16"):
        half = torch.full((9,), 0.5, dtype=getattr(torch, dtype))
        assert random.bernoulli(key, half).tolist() == jax[f"bernoulli_{dtype}"]


def test_64_bits_are_those_of_jax():
    jax, key = JAX["x64"], random.key(JAX["x64"]["seed"])
    assert key.tolist() == jax["key"]
    assert [word % 2**64 for word in random.bits(key, (3,), 64).tolist()] == [int(word) for word in jax["bits64"]]
    assert_close(random.uniform(key, (3,), torch.float64), jax["uniform_float64"])
    assert_close(random.normal(key, (3,), torch.float64), jax["normal_float64"], ulps=2)


@given(st.lists(keys(), min_size=1, max_size=4).map(torch.stack), shapes)
def test_under_vmap_a_key_draws_what_it_draws_alone(many, shape):
    logits = torch.linspace(-1, 1, 5)
    for draw in (lambda key: random.split(key, 3), lambda key: random.fold_in(key, 7),
                 lambda key: random.bits(key, shape), lambda key: random.uniform(key, shape),
                 lambda key: random.normal(key, shape), lambda key: random.categorical(key, logits),
                 lambda key: random.rademacher(key, shape), lambda key: random.like(key, [logits])[0]):
        assert torch.equal(torch.vmap(draw)(many), torch.stack([draw(key) for key in many]))


@given(st.lists(keys(), min_size=1, max_size=4).map(torch.stack), shapes, st.integers(-2**63, 2**63 - 1),
       st.integers(-5, 2**64 - 1), st.sampled_from(random.INTEGERS))
def test_under_vmap_a_key_draws_the_integers_and_orders_that_it_draws_alone(many, shape, minval, span, dtype):
    table = torch.arange(15).reshape(3, 5)
    for draw in (lambda key: random.randint(key, shape, minval, minval + span, dtype),
                 lambda key: random.permutation(key, 11), lambda key: random.permutation(key, table),
                 lambda key: random.permutation(key, table, 1), lambda key: random.permutation(key, table, 1, True),
                 lambda key: random.bernoulli(key, 0.3, shape), lambda key: random.bernoulli(key, table / 15)):
        assert torch.equal(torch.vmap(draw)(many), torch.stack([draw(key) for key in many]))
    tables = torch.stack([table + i for i in range(len(many))])
    mapped = torch.vmap(random.permutation)(many, tables)
    assert torch.equal(mapped, torch.stack([random.permutation(*each) for each in zip(many, tables, strict=True)]))


@given(keys(), st.integers(-2**63, 2**63 - 1), st.integers(-5, 2**64 - 1) | st.integers(-5, 20),
       st.sampled_from(random.INTEGERS))
def test_integers_are_those_of_the_words_by_plain_arithmetic(key, minval, span, dtype):
    info = torch.iinfo(dtype)
    width = max(info.bits, 32)
    low, high = (min(max(x, info.min), info.max + i) for i, x in enumerate((minval, minval + span)))
    count = max(high - low, 1)
    higher, lower = ([x % 2**width for x in random.bits(each, (9,), width).tolist()] for each in random.split(key))
    factor = 2**width if count <= 2 ** (width // 2) else 0  # JAX's multiplier wraps around to 0 above
    expected = [low + (a % count * (factor % count) + b % count) % count for a, b in zip(higher, lower, strict=True)]
    assert random.randint(key, (9,), minval, minval + span, dtype).tolist() == expected


@given(keys(), st.integers(2, 9), st.integers(-9, 9))
def test_integers_are_equally_likely(key, count, minval):
    drawn = random.randint(key, (4096,), minval, minval + count)
    assert drawn.min() >= minval and drawn.max() < minval + count
    assert p_value(torch.bincount(drawn - minval, minlength=count), torch.full((count,), 1 / count)) > 1e-6


@given(keys(), st.integers(0, 50), st.integers(1, 4))
def test_a_permutation_has_all_and_each_of_three_orders_equally_often(key, count, width):
    assert random.permutation(key, count).sort().values.tolist() == list(range(count))
    table = torch.arange(count * width).reshape(count, width)
    assert random.permutation(key, table)[:, 0].sort().values.tolist() == table[:, 0].tolist()
    own = random.permutation(key, table, 0, independent=True)
    assert torch.equal(own.sort(0).values, table)
    firsts = torch.vmap(lambda key: random.permutation(key, 3))(random.split(key, 3000))
    names = firsts[:, 0] * 2 + (firsts[:, 1] > firsts[:, 2])
    assert p_value(torch.bincount(names, minlength=6), torch.full((6,), 1 / 6)) > 1e-6


@given(keys(), st.floats(0, 1, width=32))
def test_true_is_drawn_with_its_probability(key, p):
    assert not random.bernoulli(key, random.uniform(key, (9,))).any()  # a number is not below itself
    drawn = random.bernoulli(key, p, (4096,))
    assert abs(float(drawn.double().mean()) - p) <= 5 * (p * (1 - p) / 4096) ** 0.5 + 2**-20


@given(keys(), st.lists(st.integers(0, ONES), min_size=1, max_size=4))
def test_under_vmap_fold_in_takes_many_numbers(key, data):
    children = torch.vmap(lambda n: random.fold_in(key, n))(torch.tensor(data))
    assert torch.equal(children, torch.stack([random.fold_in(key, n) for n in data]))


@given(keys(), shapes)
def test_an_element_depends_on_the_key_and_its_place_alone(key, shape):
    count = torch.Size(shape).numel()
    assert torch.equal(random.bits(key, shape).flatten(), random.bits(key, (count + 3,))[:count])
    assert torch.equal(random.split(key, (*shape, 2)).reshape(-1, 2), random.split(key, 2 * count + 1)[:-1])


@given(keys())
def test_children_differ_from_each_other_and_from_their_parent(key):
    family = [key, *random.split(key, 100), *(random.fold_in(key, n) for n in range(1000, 1100))]
    assert len({tuple(k.tolist()) for k in family}) == 201


@given(keys(), st.sampled_from([8, 16, 32]))
def test_every_bit_is_set_half_of_the_time(key, width):
    words = random.bits(key, (4096,), width)
    assert words.min() >= 0 and words.max() < 2**width
    for bit in range(width):
        ones = int((words >> bit & 1).sum())
        assert p_value(torch.tensor([ones, 4096 - ones]), torch.tensor([0.5, 0.5])) > 1e-6


@pytest.mark.parametrize("draw, distribution_function", [
    (random.uniform, lambda x: x),
    (random.normal, torch.special.ndtr),
    (random.gumbel, lambda x: torch.exp(-torch.exp(-x))),
])
@given(keys())
def test_its_own_distribution_function_makes_a_draw_uniform(draw, distribution_function, key):
    heights = distribution_function(draw(key, (4096,), torch.float64))
    assert p_value(torch.histc(heights, 32, 0, 1), torch.full((32,), 1 / 32)) > 1e-6


@given(keys())
def test_normal_has_mean_0_and_variance_1(key):
    x = random.normal(key, (4096,))
    assert abs(x.mean()) < 5 / 64  # 5 standard errors: sqrt(1 / 4096) each
    assert abs(x.var() - 1) < 5 * 2**0.5 / 64  # and sqrt(2 / 4096)
    assert x.isfinite().all()


@given(keys())
def test_signs_are_equally_likely(key):
    signs = random.rademacher(key, (4096,))
    assert (signs.abs() == 1).all()
    assert abs(signs.mean()) < 5 / 64  # 5 standard errors


@given(keys(), st.sampled_from(list(random.MANTISSA_BITS)), st.floats(-8, 8, width=16), st.floats(1, 8, width=16))
def test_uniform_stays_in_its_range(key, dtype, minval, width):
    unit, ranged = (random.uniform(key, (512,), dtype, *limits) for limits in ((), (minval, minval + width)))
    assert unit.dtype == dtype and unit.min() >= 0 and unit.max() < 1
    low, high = torch.tensor([minval, minval + width], dtype=dtype)
    assert ranged.min() >= low and ranged.max() <= high  # a range far from 0 rounds up to its end, as in JAX
    assert torch.equal(random.uniform(key, (3,), maxval=10**30), random.uniform(key, (3,), maxval=1e30))


@given(keys(), st.integers(1, 3).flatmap(lambda n: st.lists(st.floats(-3, 3), min_size=n + 1, max_size=n + 1)))
def test_categorical_draws_with_the_probabilities_of_softmax(key, logits):
    logits = torch.tensor([*logits, -torch.inf])
    drawn = random.categorical(key, logits, shape=(4096,))
    counts = torch.bincount(drawn, minlength=len(logits))
    assert counts[-1] == 0
    assert p_value(counts[:-1], logits.softmax(-1)[:-1]) > 1e-6


def test_categorical_draws_along_any_axis():
    logits = torch.full((2, 3, 4), -torch.inf)
    for i, j in itertools.product(range(2), range(4)):
        logits[i, (i + j) % 3, j] = 0.0
    for axis in (1, -2):
        assert torch.equal(random.categorical(random.key(0), logits, axis), logits.argmax(1))
        assert torch.equal(random.categorical(random.key(0), logits, axis, (5, 2, 4)), logits.argmax(1).expand(5, 2, 4))


@pytest.mark.parametrize("call, message", [
    (lambda: random.key(-1), r"a seed lies in \[0, 2\*\*64\), got -1"),
    (lambda: random.key(2**64), r"a seed lies in \[0, 2\*\*64\), got 18446744073709551616"),
    (lambda: random.key(1.5), "`seed` should be .*int.*, got float 1.5"),
    (lambda: random.split(torch.zeros(3, dtype=torch.int64)), r"`key` should be .*'2'.*, got int64\[3\]"),
    (lambda: random.split(torch.zeros(2)), r"`key` should be .*, got float32\[2\]"),
    (lambda: random.fold_in(random.key(0), -1), r"data lies in \[0, 2\*\*32\), got -1"),
    (lambda: random.fold_in(random.key(0), 2**32), r"data lies in \[0, 2\*\*32\), got 4294967296"),
    (lambda: random.bits(random.key(0), (), 12), "width must be 8, 16, 32 or 64, got 12"),
    (lambda: random.randint(random.key(0), (3,), 0, 5, torch.float32), "dtype must be one of .*, got torch.float32"),
    (lambda: random.permutation(random.key(0), -1), "the number of elements must be at least 0, got -1"),
    (lambda: random.permutation(random.key(0), torch.zeros(2, 3), 2), "axis 2 is not one of a tensor of 2 axes"),
    (lambda: random.permutation(random.key(0), torch.tensor(3)), "axis 0 is not one of a tensor of 0 axes"),
    (lambda: random.bernoulli(random.key(0), torch.zeros(4), (4, 3)),
     r"p of shape \(4,\) cannot be broadcast to \(4, 3\)"),
    (lambda: random.bernoulli(random.key(0), torch.zeros(4), ()), r"p of shape \(4,\) cannot be broadcast to \(\)"),
    (lambda: random.bernoulli(random.key(0), 0.5, (-1,)), r"p of shape \(\) cannot be broadcast to \(-1,\)"),
    (lambda: random.randint(random.key(0), (3, -1), 0, 5), r"a shape has no axis below 0, got \(3, -1\)"),
    (lambda: random.normal(random.key(0), (-2, -1)), r"a shape has no axis below 0, got \(-2, -1\)"),
    (lambda: random.split(random.key(0), -1), r"a shape has no axis below 0, got \(-1,\)"),
    (lambda: random.categorical(random.key(0), torch.zeros(4, 6), shape=(3, 5)),
     r"shape \(3, 5\) must end in the logits' batch axes \(4,\)"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
