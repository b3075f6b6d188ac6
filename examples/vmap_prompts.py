"""`forward` is written for tokens with any leading axes, and `vmap` adds one more wherever you like.

    python examples/vmap_prompts.py
"""

import torch

import llama_fn as lf

params, tokenizer = lf.load("stories")
names = ["Lily", "Mia", "Tom", "Max"]


def prompt(name: str) -> torch.Tensor:
    kind = "girl" if name in ("Lily", "Mia") else "boy"
    return torch.tensor(tokenizer.encode(f"Long ago there was a brave little {kind} named {name}."))


# Over prompts: what comes next, and how sure is the model? The rows are of one length, so they make one batch.
prompts = torch.stack([prompt(name) for name in names])


def next_word(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = lf.forward(params, tokens)[0][-1].softmax(-1)
    return probabilities.max(-1)


for name, probability, token in zip(names, *torch.vmap(next_word)(prompts), strict=True):
    print(f"... named {name}.  ->{tokenizer.decode([int(token)], continued=True)!r:8} p = {float(probability):.4f}")

# Over continuations of one shared prompt: the cache is not mapped, so the prompt is not computed again. To see its last
# token once more, with what follows, the cache is rewound by one: another `length`, and nothing else.
_, cache = lf.forward(params, prompts[0], lf.init_cache(params.config, max_len=64))
cache = cache._replace(length=cache.length - 1)
homes = ["She lived in a small house", "She lived in a tall tower", "He lived in a small house"]
ids = torch.tensor([[int(prompts[0, -1]), *tokenizer.encode(home, bos=False)[:6]] for home in homes])


def log_probability(tokens: torch.Tensor, cache: lf.Cache) -> torch.Tensor:
    logits, _ = lf.forward(params, tokens, cache)
    return logits[:-1].log_softmax(-1).gather(-1, tokens[1:, None]).sum()


print()
for home, nats in zip(homes, torch.vmap(log_probability, (0, None))(ids, cache), strict=True):
    print(f"{home:27} log p = {float(nats):6.2f}")

# Over keys: one prompt, a story a key.
sample = lf.sampler(temperature=1.0)
last = lf.forward(params, prompts[0])[0][-1]
drawn = torch.vmap(sample, (0, None))(lf.random.split(lf.random.key(0), 1000), last)
print(f"\n1000 draws of the next token: {drawn.bincount().max()} times the same")

# Over parameters: an ensemble is a stacked tree.
twins = lf.tree.map(lambda x: torch.stack([x, 0.9 * x, 1.1 * x]), params)
logits = torch.vmap(lambda p: lf.forward(p, prompts[0])[0][-1])(twins)
print("an ensemble's probabilities of that token:", [round(float(p.softmax(-1).max()), 4) for p in logits])
