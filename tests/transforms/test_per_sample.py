"""What each sample of a batch says by itself, and sums of clipped and private gradients, on random configs.

Everything is held against `per_sample_grads`, and that against a loop. Most is in float64, up to 1e-9.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys, models, random_params, token_rows
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fn as lf
from llama_fn.transforms.adapter import Adapted
from llama_fn.transforms.tapped import embedding_square, linear_square

B = 5  # samples
CONFIG = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> bool:
    assert a.shape == b.shape and a.dtype == b.dtype
    return bool((a - b).abs().max() <= tolerance)


def trees_close(a, b, tolerance: float = 1e-9) -> bool:
    assert lf.tree.structure(a) == lf.tree.structure(b)
    return all(close(x, y, tolerance) for x, y in zip(lf.tree.leaves(a), lf.tree.leaves(b), strict=True))


def norms_of(grads) -> torch.Tensor:
    """The norm of each sample's gradient, from the gradients."""
    return torch.stack([g.flatten(1).square().sum(1) for g in lf.tree.leaves(grads)]).sum(0).sqrt()


def masked_batch(config: lf.Config, t: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a mask with a row where all count, and one where none does."""
    mask = token_rows(config, B, t, seed=seed + 1) % 3 > 0
    mask[0], mask[1] = True, False
    return token_rows(config, B, t, seed=seed), mask


# --- gradients


@given(models(max_layers=1), st.integers(0, 99), st.sampled_from([None, 1, 2, 5, 9]))
def test_per_sample_gradients_are_a_loop_of_grad(params, seed, chunk_size):
    tokens, mask = masked_batch(params.config, 7, seed)
    grads = lf.per_sample_grads(lf.loss, params, (tokens, mask), chunk_size=chunk_size)
    looped = [torch.func.grad(lf.loss)(params, *example) for example in zip(tokens, mask, strict=True)]
    assert trees_close(grads, lf.tree.map(lambda *xs: torch.stack(xs), *looped))
    unmasked = lf.per_sample_grads(lf.loss, params, tokens, chunk_size=chunk_size)
    assert close(unmasked.embedding[2], torch.func.grad(lf.loss)(params, tokens[2]).embedding)


def test_parameters_and_batch_may_be_any_trees():
    weights = {"w": lf.random.normal(lf.random.key(0), (3, 4), torch.float64), "b": [torch.zeros(3).double()]}
    batch = {"x": lf.random.normal(lf.random.key(1), (B, 4), torch.float64), "y": torch.arange(B) % 3, "unused": None}

    def loss(weights, example):
        return -(weights["w"] @ example["x"] + weights["b"][0]).log_softmax(-1).gather(0, example["y"][None]).sum()

    grads = lf.per_sample_grads(loss, weights, batch)
    errors = (batch["x"] @ weights["w"].T).softmax(-1) - torch.eye(3, dtype=torch.float64)[batch["y"]]
    assert close(grads["b"][0], errors) and close(grads["w"], errors[:, :, None] * batch["x"][:, None])
    by_hand = errors.norm(dim=1) * (1 + batch["x"].square().sum(1)).sqrt()
    assert close(lf.per_sample_norms(loss, weights, batch), by_hand)


# --- their norms, without them


@given(models(max_layers=2), st.integers(0, 99), st.sampled_from([3, 8, 17, 40]), st.sampled_from([None, 2]))
def test_norms_are_those_of_the_per_sample_gradients(params, seed, t, chunk_size):
    batch = masked_batch(params.config, t, seed)  # of a vocabulary of 11 to 99: tokens are repeated
    expected = norms_of(lf.per_sample_grads(lf.loss, params, batch))
    assert close(lf.per_sample_norms(lf.loss, params, batch, chunk_size=chunk_size), expected)
    assert expected[1] == 0 and expected[0] > 0.1
    assert close(lf.per_sample_norms(lambda p, *x: lf.loss(p[0], *x), (params,), batch), expected)


@given(keys(), st.integers(1, 12), st.sampled_from([(3, 5), (9, 7), (20, 30)]))
def test_the_square_of_a_gradient_is_the_same_by_pairs_of_tokens(key, t, shape):
    o, d = shape  # 2 t^2 <= o d, and the reverse
    one, two, three = lf.random.split(key, 3)
    x, g = lf.random.normal(one, (t, d), torch.float64), lf.random.normal(two, (t, o), torch.float64)
    assert close(linear_square(x, g), torch.einsum("to, td -> od", g, x).square().sum())
    tokens = lf.random.bits(three, (t,)) % d
    rows = torch.nn.functional.one_hot(tokens, d).double()
    assert close(embedding_square(tokens, g, d), torch.einsum("tv, to -> vo", rows, g).square().sum())


def test_a_loss_may_go_over_several_rows_a_sample():
    params, triples = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, B, 3, 4)
    assert close(lf.per_sample_norms(lf.loss, params, triples), norms_of(lf.per_sample_grads(lf.loss, params, triples)))


def test_norms_go_through_weights_of_other_kinds():
    params, key = random_params(CONFIG, lf.random.key(0)), lf.random.key(1)

    def adapted(block: lf.Block) -> lf.Block:
        wo = block.attention.wo
        a, b = (lf.random.normal(each, shape, torch.float64) for each, shape in
                zip(lf.random.split(key), ((2, *wo.shape[1:]), (wo.shape[0], 2)), strict=True))
        return block._replace(attention=block.attention._replace(wo=Adapted(wo, a, b)))

    params = params._replace(blocks=tuple(map(adapted, params.blocks)))
    tokens = token_rows(params.config, B, 7)
    assert close(lf.per_sample_norms(lf.loss, params, tokens), norms_of(lf.per_sample_grads(lf.loss, params, tokens)))


@given(models(max_layers=2))
def test_of_any_other_tree_whatever_the_loss_does_the_norms_are_exact(params):
    tokens = token_rows(params.config, B, 7)

    def tied(weights, tokens):  # the embedding used twice, some weights only, and one in a term of its own
        embedding, blocks = weights
        decay = blocks[0].attention.wk.square().sum()
        return lf.loss(params._replace(embedding=embedding, output=embedding, blocks=blocks), tokens) + 0.01 * decay

    weights = params.embedding, params.blocks
    assert close(lf.per_sample_norms(tied, weights, tokens), norms_of(lf.per_sample_grads(tied, weights, tokens)))


def of_rows(params: lf.Params, rows: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lf.loss, (None, 0))(params, rows).mean()


CACHE = lf.forward(random_params(CONFIG, lf.random.key(9)), token_rows(CONFIG, 2),
                   lf.init_cache(CONFIG, max_len=9, dtype=torch.float64))[1]


def of_slopes(params: lf.Params, tokens: torch.Tensor) -> torch.Tensor:
    """How much the logits would move with the cache: a gradient inside of the loss."""
    slopes = torch.func.grad(lambda k: lf.forward(params, tokens, CACHE._replace(k=k))[0].square().mean())(CACHE.k)
    return slopes[0].square().sum()


def of_a_direction(params: lf.Params, tokens: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(lambda k: lf.forward(params, tokens, CACHE._replace(k=k))[0].square().mean(),
                          (CACHE.k,), (CACHE.v,))[1]


@pytest.mark.parametrize(("loss", "rows"), [
    (of_rows, (4, 7)), (of_slopes, (7,)), (of_a_direction, (7,)),
    (lambda params, rows: lf.remat(lambda rows: of_rows(params, rows))(rows), (4, 7)),
    (lambda params, tokens: lf.remat(lambda tokens: lf.loss(params, tokens))(tokens), (7,))])
def test_a_loss_with_a_transform_of_its_own_is_refused_and_measured_whole(loss, rows):
    params, batch = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, B, *rows)
    with pytest.raises(ValueError, match="embedding inside of a transform of its own .* the parameters in a tuple"):
        lf.per_sample_norms(loss, params, batch)
    whole = lf.per_sample_norms(lambda p, x: loss(p[0], x), (params,), batch)
    one_by_one = [lf.optim.global_norm(torch.func.grad(loss)(params, x)) for x in batch]
    assert close(whole, torch.stack(one_by_one))
    half = float(whole[0]) / 2
    clipped = lf.clipped_sum(lambda p, x: loss(p[0], x), (params,), batch[:1], half)
    assert half > 0 and lf.optim.global_norm(clipped) == pytest.approx(half, rel=1e-9)


def test_a_layer_computed_again_has_the_same_norms():
    params, batch = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, B, 7)
    ours = lf.per_sample_norms(lambda p, x: lf.loss(p, x, layer=lf.remat(lf.block)), params, batch)
    assert close(ours, lf.per_sample_norms(lf.loss, params, batch))


def test_norms_make_no_gradient_a_sample():
    params, tokens = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, 64, 5)
    smallest = min(x.nbytes for x in lf.tree.leaves(params) if x.ndim > 1)

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            result = f(*args, **(kwargs or {}))
            made = [x for x in lf.tree.leaves(result) if isinstance(x, torch.Tensor)]
            self.nbytes = max([self.nbytes, *(x.untyped_storage().nbytes() for x in made)])
            return result

    with Largest() as largest:
        lf.per_sample_norms(lf.loss, params, tokens)
    assert 0 < largest.nbytes < 64 * smallest
    with Largest() as largest:
        norms_of(lf.per_sample_grads(lf.loss, params, tokens))
    assert largest.nbytes >= 64 * max(x.nbytes for x in lf.tree.leaves(params))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("scale", [1, 60])  # of 60, the squares are beyond float16
def test_in_half_precision_norms_are_near_those_of_the_exact_model(dtype, tolerance, scale):
    params = lf.init_params(lf.random.key(0), CONFIG)
    rough = lf.tree.map(lambda x: x.to(dtype), params._replace(norm=scale * params.norm))
    tokens = token_rows(CONFIG, B, 20)
    norms = lf.per_sample_norms(lf.loss, rough, tokens)
    exact = lf.per_sample_norms(lf.loss, lf.tree.map(lambda x: x.double(), rough), tokens)
    assert norms.dtype == torch.float32 and exact.dtype == torch.float64 and exact.min() > 3 * scale
    assert (norms / exact - 1).abs().max() < tolerance  # 0.003 and 0.0004 seen: as much as the gradients' own


# --- clipped sums


@given(models(max_layers=1), st.integers(0, 99), st.floats(0.1, 2))
def test_a_clipped_sum_is_the_sum_of_clipped_gradients(params, seed, share):
    batch = masked_batch(params.config, 9, seed)
    grads = lf.per_sample_grads(lf.loss, params, batch)
    max_norm = share * float(norms_of(grads).median())
    factors = [min(1.0, max_norm / float(norm)) if norm > 0 else 1.0 for norm in norms_of(grads)]
    by_hand = lf.tree.map(lambda g: sum(c * x for c, x in zip(factors, g, strict=True)), grads)
    for chunk_size in (None, 1, 2, 9):
        assert trees_close(lf.clipped_sum(lf.loss, params, batch, max_norm, chunk_size=chunk_size), by_hand)


@given(models(max_layers=1), st.integers(0, B - 1), st.floats(0.01, 20))
def test_one_sample_moves_the_clipped_sum_by_max_norm_at_most(params, who, max_norm):
    tokens = token_rows(params.config, B, 7)
    others = torch.cat([tokens[:who], tokens[who + 1:]])
    with_it, without = (lf.clipped_sum(lf.loss, params, batch, max_norm) for batch in (tokens, others))
    moved = lf.optim.global_norm(lf.tree.map(torch.sub, with_it, without))
    norm = lf.per_sample_norms(lf.loss, params, tokens)[who]
    assert moved == pytest.approx(min(max_norm, float(norm)), rel=1e-9)


@given(models(max_layers=1), st.sets(st.integers(0, B - 1), min_size=1), st.sampled_from([math.inf, math.nan, 1e30]),
       st.sampled_from([None, 1, 2]))
def test_a_sample_without_a_finite_gradient_counts_as_none_and_a_warning_says_so(params, who, factor, chunk_size):
    tokens, factors = token_rows(params.config, B, 7), torch.ones(B, dtype=torch.float64)
    factors[list(who)] = factor

    def loss(params, tokens, factor):
        return lf.loss(params, tokens) * factor

    params = lf.tree.map(torch.Tensor.float, params)
    batch = tokens, factors.float()
    norms = lf.per_sample_norms(loss, params, batch)
    assert norms.isfinite().logical_not().nonzero().flatten().tolist() == sorted(who)
    sound = [i for i in range(B) if i not in who]
    expected = lf.clipped_sum(lf.loss, params, tokens[sound], 1.0)
    with pytest.warns(UserWarning, match=r"of \d samples have an infinite or NaN gradient, and count as none"):
        total = lf.clipped_sum(loss, params, batch, 1.0, chunk_size=chunk_size)
    assert trees_close(total, expected, 1e-4)
    with pytest.warns(UserWarning, match="count as none"):
        mean = lf.private_grads(loss, params, batch, max_norm=1.0, noise_multiplier=0.0, key=lf.random.key(0))
    assert trees_close(mean, lf.tree.map(lambda g: g / B, expected), 1e-4)


def test_a_model_that_overflows_for_one_sample_is_no_reason_for_nan():
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    tokens = token_rows(CONFIG, B, 7).clamp(max=75)
    tokens[2, 3] = 76
    broken = params._replace(embedding=params.embedding.index_fill(0, torch.tensor(76), math.nan))
    with pytest.warns(UserWarning, match="1 of 5 samples"):
        total = lf.clipped_sum(lf.loss, broken, tokens, 1.0)
    expected = lf.clipped_sum(lf.loss, params, tokens[[0, 1, 3, 4]], 1.0)
    assert trees_close(total, expected, 1e-5)


# --- private gradients


def private(params, batch, **options):
    plain = {"max_norm": 1.0, "noise_multiplier": 0.0, "key": lf.random.key(0)}
    return lf.private_grads(lf.loss, params, batch, **{**plain, **options})


@given(models(max_layers=1))
def test_without_noise_and_clipping_the_private_gradient_is_the_mean_gradient(params):
    tokens = token_rows(params.config, B, 7)
    assert trees_close(private(params, tokens, max_norm=math.inf), torch.func.grad(lf.loss)(params, tokens))


def test_masked_samples_do_not_count_and_the_size_is_the_one_expected():
    params, key = random_params(CONFIG, lf.random.key(0)), lf.random.key(1)
    tokens, mask = token_rows(CONFIG, B, 7), torch.ones((B, 7), dtype=torch.bool)
    mask[3:] = False  # the draw gave three samples; the rest is padding
    padded = private(params, (tokens, mask), noise_multiplier=0.5, key=key, expected_batch_size=4.0)
    drawn = private(params, tokens[:3], noise_multiplier=0.5, key=key, expected_batch_size=4.0)
    by_its_own_size = private(params, tokens[:3], noise_multiplier=0.5, key=key)
    assert trees_close(padded, drawn)
    assert trees_close(drawn, lf.tree.map(lambda g: g * 3 / 4, by_its_own_size))


def test_of_a_draw_without_samples_the_private_gradient_is_the_noise():
    params, key = random_params(CONFIG, lf.random.key(0)), lf.random.key(1)
    tokens, mask = token_rows(CONFIG, B, 7), torch.zeros((B, 7), dtype=torch.bool)  # none counts
    options = {"noise_multiplier": 0.5, "key": key, "expected_batch_size": 4}
    drawn = private(params, tokens[:0], **options)
    assert lf.optim.global_norm(drawn) > 1 and trees_close(drawn, private(params, (tokens, mask), **options))
    assert trees_close(drawn, private(params, (tokens, mask), chunk_size=2, **options))
    assert lf.optim.global_norm(lf.clipped_sum(lf.loss, params, tokens[:0], 1.0)) == 0
    with pytest.raises(ValueError, match="expected_batch_size must be positive, got 0"):
        private(params, tokens[:0])


@given(keys(), keys(), st.floats(0.1, 3), st.floats(0.1, 10))
def test_noise_is_normal_of_the_right_deviation_and_depends_on_the_key_alone(key, data, multiplier, max_norm):
    def noise(data, key):
        params = {name: lf.random.normal(data, (60, 70), torch.float64) for name in "ab"}
        xs = lf.random.normal(lf.random.fold_in(data, 1), (2, 70), torch.float64)
        noisy, plain = (lf.private_grads(lambda p, x: (p["a"] @ x).square().sum() + p["b"].sum(), params, xs,
                                         max_norm=max_norm, noise_multiplier=m, key=key) for m in (multiplier, 0))
        return lf.tree.map(lambda a, b: (a - b) * 2 / (multiplier * max_norm), noisy, plain)

    drawn, another = noise(data, key), noise(data, lf.random.fold_in(key, 1))
    assert trees_close(drawn, noise(lf.random.fold_in(data, 2), key))
    z = torch.cat(lf.tree.leaves(drawn)).flatten()
    n = len(z)
    assert abs(float(z.sum())) < 5 * math.sqrt(n)
    assert abs(float(z.square().sum()) - n) < 5 * math.sqrt(2 * n)
    assert abs(int((z.abs() < 0.6744898).sum()) - n / 2) < 2.5 * math.sqrt(n)  # half lies between the quartiles
    for a, b in ((drawn["a"], drawn["b"]), (drawn["a"], another["a"])):
        assert abs(float((a * b).sum())) < 5 * math.sqrt(a.numel())  # uncorrelated


def test_a_private_step_trains_and_keeps_the_tree():
    params, tokens = lf.init_params(lf.random.key(0), CONFIG), token_rows(CONFIG, 1, 9).expand(8, 9)
    optimizer = lf.optim.adamw(1e-2)
    state, before = optimizer.init(params), lf.loss(params, tokens)
    for key in lf.random.split(lf.random.key(1), 15):
        grads = private(params, tokens, noise_multiplier=0.1, key=key)
        assert [(g.shape, g.dtype) for g in lf.tree.leaves(grads)] == [(p.shape, p.dtype) for p in
                                                                       lf.tree.leaves(params)]
        updates, state = optimizer.update(grads, state, params)
        params = lf.optim.apply_updates(params, updates)
    assert lf.loss(params, tokens) < 0.5 * before


# --- compiled


@pytest.mark.slow
def test_traced_for_the_compiler_a_loss_with_a_transform_of_its_own_is_refused_too():
    params = random_params(CONFIG, lf.random.key(0))
    for loss, rows in ((of_rows, (4, 7)), (of_slopes, (7,))):
        traced = torch.compile(lambda p, x: lf.per_sample_norms(loss, p, x), fullgraph=True, backend="eager")  # noqa: B023
        with pytest.raises(torch._dynamo.exc.Unsupported, match="inside of a transform of its own"):
            traced(params, token_rows(CONFIG, B, *rows))


@pytest.mark.slow
def test_traced_for_the_compiler_all_is_as_in_eager_mode():
    def f(params, tokens, weight, x):
        return (lf.clipped_sum(lf.loss, params, tokens, median),
                lf.per_sample_norms(lambda p, x: lf.loss(p, x, layer=lf.remat(lf.block)), params, tokens),
                lf.clipped_sum(lambda weight, x: (weight * x).sum().sin(), weight, x, 0.5))

    params, tokens = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, B, 20)
    median = float(lf.per_sample_norms(lf.loss, params, tokens).median())
    arguments = params, tokens, torch.ones(3).double(), lf.random.normal(lf.random.key(1), (B, 3), torch.float64)
    traced = torch.compile(f, fullgraph=True, backend="aot_eager")  # what could go wrong does so before code is made
    assert trees_close(traced(*arguments), f(*arguments))


# --- bad input


def test_a_loss_that_norms_cannot_be_measured_for_is_refused_by_name():
    params, tokens = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, B, 7)
    refused = {
        "the loss uses the weight embedding twice": lambda p, x: lf.loss(p._replace(output=p.embedding), x),
        "the loss uses the weight blocks.0.attention_norm twice": lambda p, x: lf.loss(
            p._replace(blocks=p.blocks * 2), x),
        r"the loss uses the weight norm as a tensor \(square\)": lambda p, x: lf.loss(p, x) + p.norm.square().sum(),
        r"the loss uses the weight output as a tensor \(sum\)": lambda p, x: lf.loss(p, x) + torch.sum(p.output),
        r"the loss uses the weight embedding as a tensor \(bfloat16\)": lambda p, x: lf.loss(
            lf.tree.map(lambda w: w.bfloat16(), p), x),
        r"the loss uses the weight output as a tensor \(mul\)": lambda p, x: lf.loss(
            p._replace(output=2 * p.output), x),
    }
    for message, loss in refused.items():
        with pytest.raises(ValueError, match=message + ".*wrapping the parameters in a tuple"):
            lf.per_sample_norms(loss, params, tokens)
        whole = lf.per_sample_norms(lambda p, x: loss(p[0], x), (params,), tokens)  # noqa: B023
        assert close(whole, norms_of(lf.per_sample_grads(loss, params, tokens)), 1e-6)


def test_a_batch_without_a_common_axis_of_samples_is_refused():
    params, tokens = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, B, 7)
    for f in (lf.per_sample_grads, lf.per_sample_norms):
        with pytest.raises(ValueError, match=r"as many in each and at least one: 0 is \[5, 7\], 1 is \[4, 7\]"):
            f(lf.loss, params, (tokens, tokens[:4] > 0))
        with pytest.raises(ValueError, match=r"at least one: it is \[0, 7\]"):
            f(lf.loss, params, tokens[:0])
        with pytest.raises(ValueError, match=r"at least one: x is \[5, 7\], y is \[\]"):
            f(lf.loss, params, {"x": tokens, "y": tokens[0, 0]})
        with pytest.raises(ValueError, match="at least one: it has none"):
            f(lf.loss, params, ())


def test_nonsense_of_clipping_and_noise_is_refused():
    params, tokens = random_params(CONFIG, lf.random.key(0)), token_rows(CONFIG, B, 7)
    for max_norm in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"max_norm must be positive, got {max_norm}"):
            lf.clipped_sum(lf.loss, params, tokens, max_norm)
    for chunk_size in (0, -1):
        with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
            lf.clipped_sum(lf.loss, params, tokens, 1.0, chunk_size=chunk_size)
    for multiplier in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"noise_multiplier must be a number from 0 on, got {multiplier}"):
            private(params, tokens, noise_multiplier=multiplier)
    with pytest.raises(ValueError, match=r"noise of 1\.0 times an infinite max_norm"):
        private(params, tokens, noise_multiplier=1.0, max_norm=math.inf)
    with pytest.raises(ValueError, match=r"expected_batch_size must be positive, got 0\.0"):
        private(params, tokens, expected_batch_size=0.0)
