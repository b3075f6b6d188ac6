"""What a user writes with every public name. `test_types.py` has mypy and pyright check it; nobody runs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import torch
from jaxtyping import Float, Int
from torch import Tensor

import llama_fn as lf
from llama_fn.model.rope import rotation

# --- the README's first block

params, tokenizer = lf.load("stories")
tokens = torch.tensor(tokenizer.encode("Once upon a time there was"))
cache = lf.init_cache(params.config, max_len=256)
logits, cache = lf.forward(params, tokens, cache)
grads, loss = torch.func.grad_and_value(lf.loss)(params, tokens)
batch = torch.stack([tokens, tokens.flip(0)])
each = torch.vmap(torch.func.grad(lf.loss), (None, 0))(params, batch)
step = lf.jit(lf.forward, donate="cache")
logits, cache = step(params, logits[-1:].argmax(-1), cache)
model, key = lf.Model(params, tokenizer), lf.random.key(0)
for piece in lf.stream(model, "Once upon a time", key=key, sampler=lf.sampler(temperature=0.8)):
    print(piece, end="", flush=True)

# --- a cache comes out where one went in

assert_type(lf.forward(params, tokens), tuple[Tensor, lf.NoCache])
assert_type(lf.forward(params, tokens, None), tuple[Tensor, lf.NoCache])
assert_type(lf.forward(params, tokens, lf.NoCache()), tuple[Tensor, lf.NoCache])
assert_type(lf.forward(params, tokens, cache), tuple[Tensor, lf.Cache])
assert_type(lf.trunk(params, tokens), tuple[Tensor, lf.NoCache])
assert_type(lf.trunk(params, tokens, cache), tuple[Tensor, lf.Cache])
assert_type(lf.jit_layers()(params, tokens, cache), tuple[Tensor, lf.Cache])
assert_type(lf.jit_layers()(params, tokens), tuple[Tensor, lf.NoCache])
assert_type(lf.jit_layers(lf.trunk)(params, tokens, cache), tuple[Tensor, lf.Cache])
assert_type(lf.jit_layers(donate=())(params, tokens, cache), tuple[Tensor, lf.Cache])
assert_type(step(params, tokens, cache)[1], lf.Cache)
rewound = cache._replace(length=cache.length - 1)
branches = lf.fork(cache, (64,), max_len=512)
beams = lf.select(branches, [5, 5, 2])
assert_type(beams, lf.Cache)
assert_type(lf.forward(params, batch, layer=lf.remat(lf.block))[0], Tensor)


def either(params: lf.Params, tokens: Tensor, cache: lf.Cache | lf.NoCache) -> tuple[Tensor, lf.Cache | lf.NoCache]:
    """A cache or none, handed on."""
    return lf.forward(params, tokens, cache)


# --- transforms

rows, none = torch.vmap(lf.forward, (None, 0))(params, batch)
caches = lf.init_cache(params.config, (2,), max_len=64)
rows, caches = torch.vmap(lf.forward, (None, 0, 0))(params, batch, caches)
of_prompts = lf.jit(torch.vmap(lf.loss, (None, 0)))(params, batch)
direction: lf.Params = lf.random.like(key, params)


def gradient(params: lf.Params) -> Any:
    """Of one argument, for a derivative along a direction."""
    return torch.func.grad(lf.loss)(params, tokens)


hvp = torch.func.jvp(gradient, (params,), (direction,))[1]
norms: Tensor = lf.per_sample_norms(lf.loss, params, batch)
many = lf.per_sample_grads(lf.loss, params, batch, chunk_size=1)
clipped = lf.clipped_sum(lf.loss, params, batch, 1)
private = lf.private_grads(lf.loss, params, batch, max_norm=1, noise_multiplier=1.5, key=key)
remembered = lf.loss(params, tokens, layer=lf.remat(lf.block))
smoothed = lf.loss(params, tokens, z_loss=1e-4, label_smoothing=0.1)
total, count = lf.loss_sum(params, tokens, torch.ones_like(tokens, dtype=torch.bool))
assert_type(total / count, Tensor)

# --- parameters are tensors in a tree

changed = params.blocks[0].attention.wq + 1
assert_type(changed, Tensor)
norm: Tensor = params.norm * params.blocks[0].ffn_norm / 2
block = params.blocks[0]._replace(attention_norm=params.norm)
edited = params._replace(output=params.embedding, blocks=(block, *params.blocks[1:]))
half: lf.Params = lf.tree.map(Tensor.half, params)
sizes = {path: leaf.shape for path, leaf in lf.tree.paths(params).items()}
fresh = lf.init_params(key, lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70,
                                      rope_theta=1000000, rope_scaling=lf.RopeScaling("linear", 2)))
shapes = lf.abstract_params(lf.LLAMA2_7B)
released: list[lf.Config] = [lf.LLAMA2_7B, lf.LLAMA2_13B, lf.LLAMA2_70B]
small = lf.quantize(params, "int4")
plain = lf.dequantize(small)
state: dict[str, Tensor] = lf.to_hf(params)
again = lf.from_hf(state, {"hidden_size": 48})
last = lf.head(params.norm, params.output, lf.trunk(params, tokens)[0], params.config.norm_eps)
x, no_cache = lf.block(params.blocks[0], last, rotation(tokens, 24, 10000), None, None, None, 1e-5)


@lf.typed
def entropy(logits: Float[Tensor, "*b v"], temperature: float = 1.0) -> Float[Tensor, "*b"]:
    """A function of one's own with axes."""
    p = (logits / temperature).softmax(-1)
    return -(p * p.log()).sum(-1)


assert_type(entropy(logits, 2), Tensor)

# --- adapters and optimizers

adapter = lf.lora.init(key, params, rank=8, targets=lf.lora.LINEAR, alpha=16)
adapted: lf.Params = lf.lora.apply(params, adapter)
merged = lf.lora.unmerge(lf.lora.merge(params, adapter), adapter)
stacked = lf.lora.stack([adapter, adapter])
apart: list[lf.lora.Lora] = lf.lora.unstack(stacked)
lf.lora.save(adapter, "adapter", params)
loaded = lf.lora.load(Path("adapter"), params)
optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1),
                           lf.optim.adamw(lf.optim.warmup_cosine(1e-3, 10, 100), weight_decay=0,
                                          mask=lf.optim.matrices))
others = [lf.optim.lion(1e-4), lf.optim.muon(lf.optim.warmup_stable_decay(1e-2, 10, 20, 100), 0.95)]
slow = lf.optim.sgd(lf.optim.warmup_linear(1, 10, 100))
rate: Tensor = lf.optim.warmup_cosine(1, 10, 100)(3)
optimizer_state = optimizer.init(adapter)
updates, optimizer_state = optimizer.update(grads, optimizer_state, adapter)
adapter = lf.optim.apply_updates(adapter, updates)
size: Tensor = lf.optim.global_norm(grads)

# --- randomness

first, second = lf.random.split(key)
keys = lf.random.split(lf.random.fold_in(key, 3), 5)
draws = [lf.random.normal(key, (2, 3)), lf.random.uniform(key, (4,), minval=0, maxval=1), lf.random.gumbel(key),
         lf.random.bits(key), lf.random.categorical(key, logits), lf.random.rademacher(key),
         lf.random.randint(key, (3,), 0, 9), lf.random.permutation(key, 5), lf.random.permutation(key, logits, axis=1),
         lf.random.bernoulli(key, 0.3, (2,)), lf.random.bernoulli(key, logits)]

# --- text

completions = lf.text_completion(model, ["Once", "One day"], key=key, max_new_tokens=9, stop=["."], logprobs=True)
text: str = completions[0].text
written: list[lf.Generation] = lf.generate(params, [tokens, [1, 2]], key=key, stop_ids={2}, layer=lf.remat(lf.block))
told_apart: lf.DialogTokens = lf.dialog_tokens(model.tokenizer, [{"role": "user", "content": "Who?"}])
taught: Tensor = lf.loss(params, told_apart.tokens, told_apart.mask)
answers = lf.chat_completion(model, [[{"role": "user", "content": "Who?"}]], key=key)
message: lf.Message = {"role": "user", "content": "Who?"}
learned: lf.DialogTokens = lf.dialog_tokens(tokenizer, [message, {"role": "assistant", "content": "A fox."}])
of_answers = lf.loss(params, *learned)
preferred: Tensor = lf.dpo_loss(adapted, params, learned, told_apart, beta=0.1, layer=lf.remat(lf.block))
preferences = lf.dpo_loss(params, plain, (batch, batch > 9), (batch[:, :3], batch[:, :3] > 9), beta=1)
chat = lf.ask(model, lf.Chat(), "Who?")
for piece, after in lf.answer(model, chat, key=key):
    print(piece, after.tokens)
told = lf.speculate(model, model, ["Once"], key=key, n=4, narrow=lf.narrowing(top_p=0.9))
for piece, so_far in lf.speculate_stream(model, model, "Once", key=key):
    print(piece, so_far.accepted / max(so_far.proposed, 1))
scores: list[lf.Score] = lf.score(model, ["Once upon a time", " up"], prefixes=["", "Once"])
best = max(lf.score_options(model, "Once", [" upon", " up"]), key=lambda score: score.total)
measured: lf.Perplexity = lf.perplexity(model, "Once upon a time", window=9, report=print)
drawn = lf.sampler(top_k=5)(key, logits)
lf.save(model, "folder", format="hf", dtype=torch.bfloat16)
own: lf.Tokenizer = lf.train_tokenizer(["Once upon a time"], 300)
opened = lf.load_tokenizer("tokenizer.model")
story: str = lf.stories.story(key)
known: bool = lf.stories.derivable(story)
devices: dict[str, int] = lf.mesh.parse_mesh("dp=2,tp=2")
lf.keep_memory()


def pieces(model: lf.Model, key: Int[Tensor, "2"]) -> Iterator[str]:
    """A stream handed on, and an error caught."""
    try:
        yield from lf.stream(model, "Once", key=key)
    except lf.AxesError as error:
        yield str(error)


def outcomes() -> tuple[lf.Completion, lf.Speculation, lf.Block]:
    """Types to annotate with."""
    return completions[0], told[0], params.blocks[0]

