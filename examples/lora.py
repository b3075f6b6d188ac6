"""Three LoRA adapters of the stories' model, one for each of three heroes, trained in one step and served in one batch.

    python examples/lora.py [FOLDER]

An adapter is a tree, so three are one tree with a first axis. `vmap` does the rest: training maps over adapter, data
and learning rate, and the model is neither mapped nor changed. In FOLDER, each is written as PEFT does.
"""

import sys
from pathlib import Path

import torch

import llama_fn as lf

model = lf.load("stories")
params, tokenizer = model

# A lesson for each adapter: stories of the grammar in which every girl has the same name.
NAMES = ("Rosa", "Ruby", "Zoe")
HEROES = ("Lily", "Mia", "Anna", "Rosa", "Nora", "Ella", "Ruby", "Zoe")
stories = [story.text for story in lf.stories.stories(lf.random.key(1), 200)]
heroes = [(text, hero) for text in stories for hero in HEROES
          if f"girl named {hero}" in text or f"girl called {hero}" in text][:16]
LENGTH = 64  # tokens: the beginning of a story, where its hero is named
tokens = torch.tensor([[tokenizer.encode(text.replace(hero, name))[:LENGTH] for text, hero in heroes]
                       for name in NAMES])

# A key gives an adapter, and three keys under `vmap` give a stack of three. The same goes for the optimizer's state.
keys = lf.random.split(lf.random.key(0), len(NAMES))
adapters = torch.vmap(lambda key: lf.lora.init(key, params, rank=4, targets=("wq", "wv", "w_up")))(keys)
states = torch.vmap(lf.optim.adamw(0.0).init)(adapters)
rates = torch.tensor([1e-2, 1.5e-2, 2e-2])
count = sum(x.numel() for x in lf.tree.leaves(adapters)) // len(NAMES)
print(f"{count:,} numbers an adapter, beside {params.config.n_params:,} of the model")


def step(adapter: lf.lora.Lora, state: tuple, rows: torch.Tensor, rate: torch.Tensor) -> tuple:
    """One step of one adapter: it does not know that there are others."""
    grads, loss = torch.func.grad_and_value(lambda a: lf.loss(lf.lora.apply(params, a), rows))(adapter)
    updates, state = lf.optim.adamw(rate, weight_decay=0.0).update(grads, state, adapter)
    return lf.optim.apply_updates(adapter, updates), state, loss


for i in range(12):
    batch = tokens[:, i % 2 * 8:i % 2 * 8 + 8]
    adapters, states, losses = torch.vmap(step)(adapters, states, batch, rates)
    if i % 4 == 0 or i == 11:
        print(f"step {i:2}: losses", *(f"{float(loss):.3f}" for loss in losses))

# One batch of the same prompt, an adapter a row.
prompts, key = ["Long ago there was a brave little girl named"] * len(NAMES), lf.random.key(0)
texts = lf.text_completion(model, prompts, key=key, max_new_tokens=30, echo=True, adapters=adapters)
for name, text in zip(NAMES, texts, strict=True):
    print(f"\n{name}: {text.text}")

# On its own an adapter can be merged into the model, which is then as fast as before; and saved, for PEFT too.
apart = lf.lora.unstack(adapters)
merged = lf.Model(lf.lora.merge(params, apart[0]), tokenizer)
(text,) = lf.text_completion(merged, prompts[:1], key=key, max_new_tokens=30, echo=True)
print(f"\n{NAMES[0]}, merged: {text.text}\n")
if len(sys.argv) > 1:
    for name, adapter in zip(NAMES, apart, strict=True):
        folder = Path(sys.argv[1]) / name
        lf.lora.save(adapter, folder, params)
        print(f'llama-fn generate "{prompts[0]}" --adapter {folder}')
