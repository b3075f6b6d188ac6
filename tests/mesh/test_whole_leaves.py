"""What reads whole weights: it works on parts as on one device, or one clear error says what to do."""

import pytest
import torch
from meshes import Case, Setting
from worlds import world

import llama_fn as lf
from llama_fn.compiled import decoding
from llama_fn.training.dpo import dpo_loss_sum

CONFIG = lf.Config(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=40, hidden_dim=28, max_seq_len=64)
TENSOR, FSDP = Case(CONFIG, {"tp": 2}, lf.mesh.PRESETS["tensor"]), Case(CONFIG, {"dp": 2}, lf.mesh.PRESETS["fsdp"])
CASES = pytest.mark.parametrize("case", [TENSOR, FSDP], ids=["tensor", "fsdp"])


def refused(case):
    s = Setting(case, torch.float32)
    rows, tokens = s.shard(s.tokens), s.tokens
    adapter = lf.lora.init(lf.random.key(1), s.params, 3)
    unshard, shard = "lf.mesh.unshard", "lf.mesh.shard both"
    whole_cache, part = (lf.init_cache(CONFIG, (4,), max_len=9) for _ in "wp")
    part = s.shard(part)
    for remedy, f in [
        (unshard, lambda: lf.lora.merge(s.parts, s.shard(adapter))),
        (unshard, lambda: lf.lora.unmerge(s.params, s.shard(adapter))),
        (unshard, lambda: lf.per_sample_norms(lf.loss, s.parts, tokens)),
        (unshard, lambda: lf.clipped_sum(lf.loss, s.parts, tokens, 1.0)),
        (unshard, lambda: lf.private_grads(lf.loss, s.parts, tokens, max_norm=1.0, noise_multiplier=0.5,
                                           key=lf.random.key(3))),
        (unshard, lambda: s.shard(s.parts)),
        (unshard, lambda: s.shard(s.shard(adapter))),
        (shard, lambda: lf.lora.apply(s.parts, adapter)),
        (shard, lambda: lf.lora.apply(s.params, s.shard(adapter))),
        ("the config says", lambda: s.shard(s.params._replace(norm=s.params.norm[:-1]))),
        (shard, lambda: lf.tree.vdot(s.parts, s.params)),
        ("Sharded in the other", lambda: lf.tree.vdot(s.params, s.parts)),
        *([("without *b", lambda: lf.per_sample_grads(lf.loss, s.parts, rows)),
           ("mapped over rows: the plan", lambda: torch.vmap(torch.func.grad(lf.loss), (None, 0))(s.parts, rows)),
           ("multiple of 2", lambda: s.shard(tokens[:3])),
           ("no rows", lambda: s.shard(tokens[0, 0])),
           ("should be Float", lambda: lf.forward(s.parts, rows, whole_cache))] if case.plan.get("*b") else
          [("cache.k.0", lambda: lf.forward(s.parts, rows, whole_cache)),
           ("cache.k.0", lambda: lf.forward(s.params, rows, part))]),
    ]:
        with pytest.raises(ValueError, match=remedy.replace("*", r"\*")):
            f()


@CASES
def test_what_needs_whole_weights_says_so(case):
    world(case.devices)(refused, case)


def shapes(case):
    """A part shows the axes with which the device computes: its own heads and hidden numbers, and all of the rest."""
    s = Setting(case)
    attention, feed_forward = s.parts.blocks[0].attention, s.parts.blocks[0].feed_forward
    n = 2 if "k" in case.plan else 1
    assert attention.wq.shape == (2 // n, 3, 4, 24)
    assert attention.wo.shape == (24, 2 // n, 3, 4)
    assert feed_forward.w_down.shape == (24, 28 // n)
    assert s.parts.output.shape == s.parts.embedding.shape == (40, 24)
    assert s.parts.norm.shape == (24,)
    assert feed_forward.w_down.whole == (24, 28)


@CASES
def test_a_part_shows_the_axes_with_which_its_device_computes(case):
    world(case.devices)(shapes, case)


def preferences(case):
    s = Setting(case)
    reference = lf.tree.map(lambda x: x * 0.9, s.params)
    worse, mask = s.tokens.flip(-1), s.mask

    def loss(params, reference, chosen, rejected, mask):
        return lf.dpo_loss(params, reference, (chosen, mask), (rejected, mask), beta=0.3)

    def loss_sum(params, reference, chosen, rejected, mask):
        both = torch.stack([chosen, rejected], 1), torch.stack([mask, mask], 1)
        return dpo_loss_sum(params, reference, *both, beta=0.3)

    whole, part = (s.params, reference, s.tokens, worse, mask), (s.parts, s.shard(reference),
                                                                 *s.shard((s.tokens, worse, mask)))
    s.equal(torch.func.grad_and_value(loss)(*part), torch.func.grad_and_value(loss)(*whole))
    s.equal(torch.func.grad_and_value(loss_sum, has_aux=True)(*part),
            torch.func.grad_and_value(loss_sum, has_aux=True)(*whole))


@CASES
def test_preferences_are_those_of_all_rows(case):
    world(case.devices)(preferences, case)


def masks(case):
    """A mask of weights by name, and `outputs`, say of a part what they say of the whole."""
    s = Setting(case)
    by_name = lf.tree.map_with_path(lambda path, x: path.endswith(("wq", "w_up")), s.params)
    updates = lf.tree.map(torch.cos, s.params), lf.tree.map(torch.cos, s.parts)
    for mask in (by_name, lf.optim.matrices, None):
        decay = lf.optim.add_decayed_weights(0.3, mask)
        s.equal(decay.update(updates[1], (), s.parts)[0], decay.update(updates[0], (), s.params)[0], atol=0)
    assert lf.tree.structure(lf.optim.outputs(s.parts)) == lf.tree.structure(lf.optim.outputs(s.params))
    adapter = lf.lora.init(lf.random.key(1), s.params, 3)
    outputs = lf.optim.outputs
    assert lf.tree.leaves(outputs(s.shard(adapter))) == lf.tree.leaves(outputs(adapter)) == [
        n for path in adapter.matrices for n in ((1, 3) if path.endswith("wq") else (1, 2))]
    muon = lf.optim.muon(0.1)
    grads = lf.tree.map(lambda x: lf.random.normal(lf.random.key(2), x.shape), adapter)
    part = s.shard(grads)
    s.equal(muon.update(part, muon.init(part), part)[0], muon.update(grads, muon.init(grads), grads)[0], atol=1e-4)
    state = muon.init(s.parts)[0]
    assert state.momentum.keys() == muon.init(s.params)[0].momentum.keys()
    s.equal(state, muon.init(s.params)[0])


@CASES
def test_masks_and_outputs_are_those_of_the_whole(case):
    world(case.devices)(masks, case)


def each_sample(case):
    s = Setting(case, rows=3)
    parts = lf.per_sample_grads(lf.loss, s.parts, s.tokens, chunk_size=2)
    s.equal(parts, lf.per_sample_grads(lf.loss, s.params, s.tokens))


def test_gradients_of_each_sample_are_unsharded_with_their_axis_of_samples():
    world(2)(each_sample, TENSOR)


def text(case):
    """The embedded model on parts generates, scores and measures as on one device."""
    model = lf.load("stories")
    device_mesh = Setting(case).device_mesh
    parts = lf.Model(lf.mesh.shard(model.params, device_mesh, case.plan), model.tokenizer)
    prompts = ["Once upon a time", "The cat"]
    greedy = {"key": lf.random.key(0), "max_new_tokens": 8, "sampler": lf.sampler(0.0)}
    own, whole = (lf.text_completion(x, prompts, **greedy) for x in (parts, model))
    assert [x.text for x in own] == [x.text for x in whole]
    (own,), (whole,) = (lf.score(x, prompts[:1]) for x in (parts, model))
    assert own.tokens == whole.tokens
    assert own.logprobs == pytest.approx(whole.logprobs, abs=1e-4)
    own, whole = (lf.perplexity(x, "Once upon a time there was a cat.", window=8) for x in (parts, model))
    assert own.nats == pytest.approx(whole.nats, rel=1e-4)


@pytest.mark.parametrize("plan", [*lf.mesh.PRESETS])
def test_text_is_that_of_one_device_by_every_preset(plan):
    mesh = {"dp": 2, "tp": 2} if "+" in plan else {"tp" if plan == "tensor" else "dp": 2}
    case = Case(CONFIG, mesh, plan)
    world(case.devices)(text, case)


def different_texts(case):
    rank = torch.distributed.get_rank()
    parts = Setting(case, torch.float32).parts
    for prompts, limit in ([[1, 2, 3 + rank]], 4), ([[1] * (2 + rank)], 4), ([[1, 2]], 4 + rank):
        with pytest.raises(ValueError, match="prompts and their limit: rank 1 was given another one than rank 0"):
            lf.generate(parts, prompts, key=lf.random.key(0), max_new_tokens=limit)


@CASES
def test_processes_that_are_given_different_prompts_are_told(case):
    world(2)(different_texts, case)


def compiled_text(case):
    """A step of decoding that was compiled by layers, as for a large model."""
    model = lf.load("stories")
    parts = lf.Model(lf.mesh.shard(model.params, Setting(case).device_mesh, case.plan), model.tokenizer)
    calls, rows = {"key": lf.random.key(0), "max_new_tokens": 8, "sampler": lf.sampler(0.5)}, ["Once upon a time", "A"]
    whole = lf.text_completion(model, rows, **calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "LARGE", 0)
        assert decoding.pays(parts.params, len(rows))
        own = lf.text_completion(parts, rows, **calls)
    assert [x.tokens for x in own] == [x.tokens for x in whole]


@pytest.mark.slow
@pytest.mark.parametrize("case", [TENSOR, FSDP])
def test_compiled_text_is_that_of_one_device(case):
    world(2)(compiled_text, case)
