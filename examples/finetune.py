"""Fine-tune the stories' model with `torch.func.grad`: from now on, every hero is called Ada.

    python examples/finetune.py

Gradients are a tree like the parameters; the optimizer's state is another. Nothing is changed in place, so both the
old and the new model are there at the end.
"""

import torch

import llama_fn as lf

model = lf.load("stories")
params, tokenizer = model

# The lesson: stories of the grammar, with every hero renamed.
HEROES = ("Lily", "Mia", "Anna", "Rosa", "Nora", "Ella", "Ruby", "Zoe")
stories = [story.text for story in lf.stories.stories(lf.random.key(1), 200)]
lesson = [text.replace(name, "Ada") for text in stories for name in HEROES
          if f"girl named {name}" in text or f"girl called {name}" in text][:32]
rows = [tokenizer.encode(text, eos=True) for text in lesson]
longest = max(map(len, rows))
tokens = torch.tensor([row + [tokenizer.eos_id] * (longest - len(row)) for row in rows])
mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])

optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0), lf.optim.adamw(1e-3, weight_decay=0.0))
tuned, state = params, optimizer.init(params)
for step in range(20):
    batch = slice(step % 4 * 8, step % 4 * 8 + 8)
    grads, loss = torch.func.grad_and_value(lf.loss)(tuned, tokens[batch], mask[batch])
    updates, state = optimizer.update(grads, state, tuned)
    tuned = lf.optim.apply_updates(tuned, updates)
    if step % 5 == 0 or step == 19:
        print(f"step {step:2}: loss {float(loss):.3f}")

# The norm of each example's gradient: one gradient a sample, by `vmap` over the same function.
norms = torch.vmap(lambda row, counts: lf.optim.global_norm(torch.func.grad(lf.loss)(params, row, counts)))(
    tokens[:4], mask[:4])
print("gradient norms of four examples before the lesson:", [round(float(x), 2) for x in norms])

prompt = ["Long ago there was a brave little girl named"]
for name, weights in (("before", params), ("after", tuned)):
    story_teller = lf.Model(weights, tokenizer)
    (text,) = lf.text_completion(story_teller, prompt, key=lf.random.key(0), max_new_tokens=40, echo=True)
    print(f"\n{name}: {text.text}")
