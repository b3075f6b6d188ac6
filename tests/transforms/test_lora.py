"""Adapters: what they compute, that nothing but them is trained, and that many at once are one at a time."""

import math
from collections import Counter

import pytest
import torch
from adapters import ALL, CONFIG, targets, trained
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys, models, random_params, token_rows
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fn as lf
from llama_fn import lora, tree
from llama_fn.training import optim
from llama_fn.training.step import make_step
from llama_fn.transforms.adapter import Adapted

B, T = 5, 7  # adapters or rows, tokens


def pool(params: lf.Params, count: int = B, **how) -> list[lora.Lora]:
    return [trained(key, params, **how) for key in lf.random.split(lf.random.key(8), count)]


def close(a, b, tolerance: float = 1e-9) -> bool:
    assert tree.structure(a) == tree.structure(b)
    pairs = list(zip(tree.leaves(a), tree.leaves(b), strict=True))
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
    return all(float((x - y).abs().max()) <= tolerance for x, y in pairs)


def logits(params: lf.Params, tokens: torch.Tensor) -> torch.Tensor:
    return lf.forward(params, tokens)[0]


# --- what an adapter computes


@given(models(), keys(), targets, st.integers(1, 9))
def test_a_new_adapter_changes_nothing(params, key, names, rank):
    adapter, tokens = lora.init(key, params, rank, names), token_rows(params.config, B, T)
    assert torch.equal(logits(lora.apply(params, adapter), tokens), logits(params, tokens))
    merged = lora.merge(params, adapter)
    assert merged.config == params.config and all(map(torch.equal, tree.leaves(merged), tree.leaves(params)))
    assert {path.split(".")[-1] for path in adapter.matrices} == set(names)
    assert len(adapter.matrices) == params.config.n_layers * len(set(names) - {"output"}) + ("output" in names)


@given(models(), keys(), targets, st.floats(0.5, 32))
def test_apply_is_merge_is_the_formula(params, key, names, alpha):
    adapter, tokens = trained(key, params, 3, names, alpha), token_rows(params.config, B, T)
    applied, merged = lora.apply(params, adapter), lora.merge(params, adapter)
    assert close(logits(applied, tokens), logits(merged, tokens))
    assert not close(logits(applied, tokens), logits(params, tokens), 1e-3)
    before, after = tree.paths(params), tree.paths(merged)
    for path, (a, b) in adapter.matrices.items():  # r, inputs and outputs, with or without heads
        inputs = a[0].numel()
        flat = before[path].reshape(-1, inputs) + alpha / 3 * b.reshape(-1, 3) @ a.reshape(3, inputs)
        assert close(after[path], flat.reshape(before[path].shape))
    assert all(after[path] is before[path] for path in before if path not in adapter.matrices)


@given(models(), keys())
def test_unmerge_inverts_merge(params, key):
    adapter = trained(key, params)
    there_and_back = lora.unmerge(lora.merge(params, adapter), adapter)
    assert close(there_and_back, params)
    assert not close(lora.merge(params, adapter), params, 1e-3)


@given(models(), keys())
def test_adapters_add_up(params, key):
    one, other = trained(key, params, 3), trained(lf.random.fold_in(key, 1), params, 2, ("wq", "wo", "w_up"), 7.0)
    tokens = token_rows(params.config, B, T)
    twice = lora.apply(lora.apply(params, one), other)
    assert close(logits(twice, tokens), logits(lora.merge(lora.merge(params, other), one), tokens))
    assert not close(logits(twice, tokens), logits(lora.apply(params, one), tokens), 1e-3)


@given(models(), keys())
def test_apply_and_merge_do_not_mutate_and_apply_does_not_copy(params, key):
    adapter = trained(key, params)
    before = tree.map(torch.clone, (params, adapter))
    applied = lora.apply(params, adapter)
    lora.merge(params, adapter)
    assert close(before, (params, adapter), 0)
    assert applied.blocks[0].attention.wq.weight is params.blocks[0].attention.wq
    assert applied.blocks[0].attention.wq.shape == params.blocks[0].attention.wq.shape


def test_a_is_uniform_within_pefts_range_and_every_matrix_has_its_own():
    config = lf.Config(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=170)
    adapter = lora.init(lf.random.key(0), lf.init_params(lf.random.key(1), config), 40, ALL)
    for path, (a, b) in adapter.matrices.items():
        bound = 1 / math.sqrt(170 if path.endswith("w_down") else 96)  # kaiming_uniform_(a=sqrt(5))
        assert a.abs().max() <= bound and float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert b.shape[-1] == a.shape[0] == 40 and not b.any()
    assert len({float(x.a.flatten()[0]) for x in adapter.matrices.values()}) == len(adapter.matrices)


def test_a_target_is_a_path_or_the_end_of_one():
    params = lf.init_params(lf.random.key(0), lf.Config(48, 3, 6, 2, 77, 70))
    adapter = lora.init(lf.random.key(0), params, 2, ["blocks.1.attention.wq", "feed_forward.w_up", "output"])
    assert list(adapter.matrices) == ["blocks.0.feed_forward.w_up", "blocks.1.attention.wq",
                                      "blocks.1.feed_forward.w_up", "blocks.2.feed_forward.w_up", "output"]
    tokens = token_rows(params.config, T)
    assert torch.equal(logits(lora.apply(params, adapter), tokens), logits(params, tokens))


def test_adapters_are_float32_beside_bfloat16_weights_and_compute_in_bfloat16():
    params = random_params(CONFIG, lf.random.key(0), torch.bfloat16)
    adapter, tokens = trained(lf.random.key(1), params), token_rows(CONFIG, B, T)
    assert {x.dtype for x in tree.leaves(adapter)} == {torch.float32}
    assert logits(lora.apply(params, adapter), tokens).dtype == torch.bfloat16
    assert {x.dtype for x in tree.leaves(lora.merge(params, adapter))} == {torch.bfloat16}
    grads = torch.func.grad(lambda a: lf.loss(lora.apply(params, a), tokens))(adapter)
    tiny = tree.map(lambda x: x + 1e-6, adapter)  # which in bfloat16 would be lost
    assert {x.dtype for x in tree.leaves(grads)} == {torch.float32} and not close(tiny, adapter, 0)
    exact = tree.map(torch.Tensor.double, params)
    wanted = torch.func.grad(lambda a: lf.loss(lora.apply(exact, a), tokens))(tree.map(torch.Tensor.double, adapter))
    for rough, fine in zip(tree.leaves(grads), tree.leaves(wanted), strict=True):
        assert (rough - fine).norm() < 0.1 * fine.norm()  # 8 bits a number: 0.03 seen


# --- training: the adapter and nothing else


class Allocations(TorchDispatchMode):
    """How many new tensors there are of each size in bytes, in whatever runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree.leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.sizes[x.untyped_storage().nbytes()] += 1
        return result


def adapter_step(params, adapter, state, tokens, rate):
    """One step of training, of this adapter alone."""
    grads, loss = torch.func.grad_and_value(lambda a: lf.loss(lora.apply(params, a), tokens))(adapter)
    updates, state = optim.adamw(rate).update(grads, state, adapter)
    return optim.apply_updates(adapter, updates), state, loss


def largest_allocation(f) -> int:
    with Allocations() as seen:
        f()
    return max(seen.sizes)


def test_nothing_of_a_weights_size_is_allocated_and_the_weights_stay_where_they_are():
    config = lf.Config(dim=60, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=77, hidden_dim=70)
    params = random_params(config, lf.random.key(0))
    adapter, tokens = trained(lf.random.key(1), params, 2), token_rows(config, 5)
    state = optim.adamw(1e-3).init(adapter)
    before = [(x.data_ptr(), x.clone()) for x in tree.leaves(params)]
    smallest = min(x.nbytes for x in tree.leaves(params) if x.ndim > 1)
    assert largest_allocation(lambda: adapter_step(params, adapter, state, tokens, 1e-3)) < smallest
    # The same of a gradient of the weights is seen: this would find it.
    assert largest_allocation(lambda: torch.func.grad(lf.loss)(params, tokens)) >= smallest
    assert sum(x.nbytes for x in tree.leaves(state)) == 2 * sum(x.nbytes for x in tree.leaves(adapter)) + 2 * 8
    assert all(x.data_ptr() == place and torch.equal(x, old)
               for x, (place, old) in zip(tree.leaves(params), before, strict=True))


@given(models(max_layers=1), keys())
def test_the_gradient_is_the_finite_difference(params, key):
    adapter, tokens = trained(key, params), token_rows(params.config, 3, T)
    direction = trained(lf.random.fold_in(key, 1), params)
    grads = torch.func.grad(lambda a: lf.loss(lora.apply(params, a), tokens))(adapter)
    assert tree.structure(grads) == tree.structure(adapter)
    ahead, behind = (lf.loss(lora.merge(params, tree.map(lambda x, d: x + s * d, adapter, direction)), tokens)  # noqa: B023
                     for s in (1e-5, -1e-5))
    slope = sum((g * d).sum() for g, d in zip(tree.leaves(grads), tree.leaves(direction), strict=True))
    assert float(slope) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-5, abs=1e-8)


def test_training_lowers_the_loss_and_the_steps_of_the_library_take_an_adapter():
    params = random_params(CONFIG, lf.random.key(0))
    tokens = token_rows(CONFIG, 3, 12)
    adapter = lora.init(lf.random.key(1), params, 4, lora.LINEAR)
    state, losses = optim.adamw(2e-2).init(adapter), []
    for _ in range(20):
        adapter, state, loss = adapter_step(params, adapter, state, tokens, 2e-2)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    # An applied model is a tree of parameters like any other: here all of it is trained, the weights too.
    applied, optimizer = lora.apply(params, adapter), optim.sgd(0.1)
    new, *_ = make_step(optimizer)(applied, optimizer.init(applied), tokens[None], tokens[None] >= 0)
    assert isinstance(new.output, torch.Tensor) and isinstance(new.blocks[0].attention.wq, Adapted)
    assert float(lf.loss(new, tokens)) < float(lf.loss(applied, tokens))


# --- many at once


def test_many_new_adapters_are_one_at_a_time():
    params = random_params(CONFIG, lf.random.key(0))
    each = lf.random.split(lf.random.key(1), B)
    mapped = torch.vmap(lambda key: lora.init(key, params, 3, ALL))(each)
    assert close(mapped, lora.stack([lora.init(key, params, 3, ALL) for key in each]), 0)
    states = torch.vmap(optim.adamw(1e-3).init)(mapped)
    assert all(x.is_contiguous() for x in tree.leaves((mapped, states)))  # memory of their own: they can be donated


@given(models(max_layers=1), keys(), st.integers(1, 3))
def test_unstack_inverts_stack(params, key, count):
    adapters = pool(params, count)
    assert all(close(*pair, 0) for pair in zip(lora.unstack(lora.stack(adapters)), adapters, strict=True))


@given(models(max_layers=1), keys())
def test_many_adapters_trained_in_one_step_are_one_at_a_time(params, key):
    """Each with its own data, learning rate and draws."""
    def step(adapter, state, key, rate):
        tokens = lf.random.bits(key, (3, T)) * params.config.vocab_size >> 32
        return adapter_step(params, adapter, state, tokens, rate)

    adapters, each = pool(params, 3), lf.random.split(key, (2, 3))
    rates = torch.tensor([1e-3, 5e-3, 1e-2], dtype=torch.float64)
    many = lora.stack(adapters)
    states = torch.vmap(optim.adamw(1.0).init)(many)
    for step_keys in each:
        many, states, losses = torch.vmap(step)(many, states, step_keys, rates)
    for i, one in enumerate(adapters):
        state = optim.adamw(1.0).init(one)
        for step_keys in each:
            one, state, loss = step(one, state, step_keys[i], rates[i])
        assert close(lora.unstack(many)[i], one, 1e-8) and close(tree.map(lambda x: x[i], states)[0], state[0])  # noqa: B023
        assert close(losses[i], loss)


@pytest.mark.slow
@given(models(max_layers=2), st.integers(0, 3))
def test_many_adapters_served_in_one_batch_are_one_at_a_time(params, seed):
    """A row each, from the prompt on through the cache, at their own lengths."""
    adapters, tokens = pool(params), token_rows(params.config, B, T, seed=seed)
    lengths = torch.tensor([3, 1, 5, 2, 4])

    def serve(adapter, row, cache):
        return lf.forward(lora.apply(params, adapter), row, cache)

    many, cache = lora.stack(adapters), lf.init_cache(params.config, (B,), max_len=9, dtype=torch.float64)
    _, cache = torch.vmap(serve)(many, tokens[:, :5], cache)
    cache, pieces = cache._replace(length=lengths), []
    for t in (5, 6):
        piece, cache = torch.vmap(serve)(many, tokens[:, t:t + 1], cache)
        pieces.append(piece)
    for row, (adapter, length) in enumerate(zip(adapters, lengths, strict=True)):
        alone = logits(lora.merge(params, adapter), torch.cat((tokens[row, :length], tokens[row, 5:7])))
        assert close(torch.cat(pieces, 1)[row], alone[length:])


@pytest.mark.slow
def test_completions_with_an_adapter_a_row_are_one_at_a_time(model):
    params = tree.map(torch.Tensor.double, model.params)
    model, adapters = lf.Model(params, model.tokenizer), pool(params)
    prompts, each = ["Once", "Long ago there was", "", "A", "The red ball"], lf.random.split(lf.random.key(4), B)
    how = {"max_new_tokens": 9, "logprobs": True, "sampler": lf.sampler(1.0)}
    many = lf.text_completion(model, prompts, key=each, adapters=lora.stack(adapters), **how)
    assert len({len(row.tokens) for row in many}) > 1 or len({row.text for row in many}) == B
    plain = lf.text_completion(model, prompts, key=each, **how)
    for row, (adapter, prompt) in enumerate(zip(adapters, prompts, strict=True)):
        merged = lf.Model(lora.merge(params, adapter), model.tokenizer)
        alone, = lf.text_completion(merged, [prompt], key=each[row], **how)
        assert many[row][:2] == alone[:2] and many[row].logprobs == pytest.approx(alone.logprobs, abs=1e-9)
        assert many[row].tokens != plain[row].tokens
    dialogs = [[{"role": "user", "content": word}] for word in ("one", "two")]
    how = {"key": lf.random.key(5), "max_new_tokens": 5}
    two = lf.chat_completion(model, dialogs, adapters=lora.stack(adapters[:2]), **how)
    for row, adapter in enumerate(adapters[:2]):
        merged = lf.Model(lora.merge(params, adapter), model.tokenizer)
        assert lf.chat_completion(merged, [dialogs[row]], **how) == [two[row]]


def test_a_row_that_ends_takes_its_adapter_along(model):
    params = tree.map(torch.Tensor.double, model.params)
    model, adapters = lf.Model(params, model.tokenizer), pool(params, 3)
    prompts = ["Once", "Long ago", "A"]
    how = {"key": lf.random.key(4), "max_new_tokens": 8, "sampler": lf.sampler(1.0)}
    free = lf.text_completion(model, prompts, adapters=lora.stack(adapters), **how)
    stop = model.tokenizer.decode(free[0].tokens[:2])[-1]  # the first row ends early, the others may go on
    ended = lf.text_completion(model, prompts, adapters=lora.stack(adapters), stop=[stop], **how)
    assert len(ended[0].tokens) < 8 and len({len(row.tokens) for row in ended}) > 1
    for row, adapter in enumerate(adapters):
        merged = lf.Model(lora.merge(params, adapter), model.tokenizer)
        assert lf.text_completion(merged, [prompts[row]], stop=[stop], **how) == [ended[row]]


@pytest.mark.slow
def test_a_compiled_step_of_many_adapters_is_the_eager_one_in_place():
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    many, tokens = lora.stack(pool(params, 3, names=("wq", "wo"))), token_rows(CONFIG, 3, T)
    states = torch.vmap(optim.adamw(1e-3).init)(many)
    rates = torch.tensor([1e-3, 2e-3, 4e-3])

    def step(params, adapter, state, tokens, rate):
        return torch.vmap(adapter_step, (None, 0, 0, 0, 0))(params, adapter, state, tokens, rate)

    eager = step(params, many, states, tokens, rates)
    places = [x.data_ptr() for x in tree.leaves((many, states))]
    compiled = lf.jit(step, donate=("adapter", "state"))(params, many, states, tokens, rates)
    assert [x.data_ptr() for x in tree.leaves(compiled[:2])] == places
    assert close(compiled[0], eager[0], 1e-4) and close(compiled[2], eager[2], 1e-5)


# --- bad input


def test_targets_that_are_no_weights_are_refused():
    params = lf.init_params(lf.random.key(0), CONFIG)
    for wrong in ("w1", "embedding", "attention_norm", "q", "blocks.1.attention.wq", ""):
        with pytest.raises(ValueError, match=f"lora.init: '{wrong}' is no weight that can be adapted; those are wq"):
            lora.init(lf.random.key(0), params, 2, ["wq", wrong])
    for wrong in ("wq", []):
        with pytest.raises(ValueError, match=r"targets is a list of names of weights, got "):
            lora.init(lf.random.key(0), params, 2, wrong)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora.init(lf.random.key(0), params, 0)
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha must lie in "):
            lora.init(lf.random.key(0), params, 2, alpha=wrong)
    with pytest.raises(ValueError, match=r"its dtype must be a floating one, got torch\.int32"):
        lora.init(lf.random.key(0), params, 2, dtype=torch.int32)


@pytest.mark.parametrize("use", [lora.apply, lora.merge, lora.unmerge, lambda params, a: lora.save(a, "here", params)])
def test_an_adapter_that_does_not_fit_is_refused(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = random_params(CONFIG, lf.random.key(0))
    wide = random_params(lf.Config(60, 1, 6, 2, 77, 70), lf.random.key(0))
    deep = random_params(lf.Config(48, 2, 6, 2, 77, 70), lf.random.key(0))
    with pytest.raises(ValueError, match=r"(?s)blocks.0.attention.wq: A \[3, 60\] and B \[2, 3, 10, 3\] should be "
                                         r"\[r, 48\] and \[2, 3, 8, r\].*blocks.0.attention.wo: A \[3, 2, 3, 10\]"):
        use(params, trained(lf.random.key(1), wide))
    with pytest.raises(ValueError, match=r"blocks.1.attention.wq: the model has no such weight"):
        use(params, trained(lf.random.key(1), deep))
    with pytest.raises(ValueError, match=r"should be \[r, 48\] and \[2, 3, 8, r\]; `vmap` over a stack, or `unstack`"):
        use(params, lora.stack(pool(params, 2)))
    good = trained(lf.random.key(1), params, names=("wq",))
    (path, (a, b)), = good.matrices.items()
    for bad in (lora.LowRank(a[:2], b), lora.LowRank(a[:, 1:], b), lora.LowRank(a, b[1:])):
        with pytest.raises(ValueError, match=r"A \[[23], 4[78]\] and B \[[12], 3, 8, 3\] should be"):
            use(params, good._replace(matrices={path: bad}))
    assert not list(tmp_path.iterdir())


def test_adapters_of_different_kinds_make_no_stack():
    params = random_params(CONFIG, lf.random.key(0))
    one = trained(lf.random.key(0), params, 3, ("wq", "wv"))
    for other, what in ((trained(lf.random.key(0), params, 2, ("wq", "wv")), "blocks.0.attention.wq"),
                        (trained(lf.random.key(0), params, 3, ("wq",)), "blocks.0.attention.wv"),
                        (trained(lf.random.key(0), params, 3, ("wq", "wv"), 1.0), r"Scale\(alpha=1.0\)")):
        with pytest.raises(ValueError, match=f"lora.stack: adapters 0 and 2 differ in {what}; stack those of one kind"):
            lora.stack([one, one, other])
    with pytest.raises(ValueError, match=r"lora.stack: there are no adapters"):
        lora.stack([])
    for rank in (2, 3):  # of rank 2, as there are two heads, the first axes of A and B are of one size
        with pytest.raises(ValueError, match=r"lora.unstack: this is no stack of adapters, .* before that of the rank"):
            lora.unstack(trained(lf.random.key(0), params, rank, ("wq",)))
    with pytest.raises(ValueError, match=r"lora.unstack: .* for it has no matrices"):
        lora.unstack(one._replace(matrices={}))


def test_what_is_applied_is_neither_saved_nor_merged_into(model, tmp_path):
    adapter = trained(lf.random.key(0), model.params, names=("wv", "output"))
    applied = lora.apply(model.params, adapter)
    for act in (lambda: lf.save(lf.Model(applied, model.tokenizer), tmp_path / "new"), lambda: lf.to_hf(applied)):
        with pytest.raises(ValueError, match=r"is not a plain tensor, .* first: use lora.merge in place of lora.apply"):
            act()
    with pytest.raises(ValueError, match=r"blocks.0.attention.wv is no tensor but Adapted: merge into the parameters"):
        lora.merge(applied, adapter)
    assert not list(tmp_path.iterdir())
    lf.save(lf.Model(lora.merge(model.params, adapter), model.tokenizer), tmp_path / "new")


def test_as_many_adapters_as_rows(model):
    with pytest.raises(ValueError, match="adapters should be a stack of 3, one a prompt; the first axes of .* are 2$"):
        lf.text_completion(model, ["a", "b", "c"], key=lf.random.key(0), adapters=lora.stack(pool(model.params, 2)))
    one = trained(lf.random.key(0), model.params, 3)
    with pytest.raises(ValueError, match="adapters should be a stack of 3, one a prompt; .* are 2, 3, 48, 70, 401"):
        lf.text_completion(model, ["a", "b", "c"], key=lf.random.key(0), adapters=one)
