"""One model on several processes: each has a part of every weight, and runs the same program.

    torchrun --nproc-per-node 2 examples/mesh.py [STEPS]

With `python examples/mesh.py` there is one process, and its part is the whole. The functions are those of one device:
nothing below says what is sent, and when.
"""

import os
import sys

import torch
import torch.distributed as dist

import llama_fn as lf

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 8
count = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun says how many processes there are
sizes = {"dp": max(1, count // 2), "tp": min(2, count)}
mesh = lf.mesh.make_mesh(sizes)
first = dist.get_rank() == 0  # all processes compute, and one speaks

# A plan maps axes of the model to axes of the mesh. This preset is {"*b": "dp", "d": "dp", "k": "tp", "f": "tp",
# "v": "tp"}: rows and the width are divided over dp; heads, hidden numbers and the vocabulary over tp.
PLAN = "fsdp+tensor"
whole, tokenizer = lf.load("stories")
params = lf.mesh.shard(whole, mesh, PLAN)
wq, numbers = params.blocks[0].attention.wq, sum(x.numel() for x in lf.tree.leaves(params))
if first:
    print(f"mesh {sizes}: a process has {numbers:,} of {whole.config.n_params:,} numbers")
    print(f"wq, whole {wq.whole}: a process keeps {tuple(wq.local.shape)} and computes with {wq.shape}")

# A lesson, as in finetune.py: every hero is called Ada. Each process takes its rows of it.
HEROES = ("Lily", "Mia", "Anna", "Rosa", "Nora", "Ella", "Ruby", "Zoe")
stories = [story.text for story in lf.stories.stories(lf.random.key(1), 200)]
lesson = [text.replace(name, "Ada") for text in stories for name in HEROES if f"girl named {name}" in text][:16]
tokens = torch.tensor([tokenizer.encode(text)[:48] for text in lesson])
rows = lf.mesh.shard(tokens, mesh, PLAN)

# The loss is that of all rows, on every process; the gradient has parts as the weights have.
with lf.mesh.counted(mesh) as sent:
    grads, loss = torch.func.grad_and_value(lf.loss)(params, rows)
expected = torch.func.grad(lf.loss)(whole, tokens)
differences = lf.tree.map(lambda x, y: (x - y).abs().max(), lf.mesh.unshard(grads), expected)
if first:
    print(f"loss {float(loss):.4f}, gradient within {float(max(lf.tree.leaves(differences))):.0e} of one device's")
    for (kind, axis), size in sent.items():
        print(f"  {kind} over {axis}: {size / 1e6:.2f} MB sent by each process")

# Optimizers see plain tensors: each process updates its part.
optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0), lf.optim.adamw(2e-3, weight_decay=0.0))
tuned, state = params, optimizer.init(params)
for step in range(steps):
    grads, loss = torch.func.grad_and_value(lf.loss)(tuned, rows)
    updates, state = optimizer.update(grads, state, tuned)
    tuned = lf.optim.apply_updates(tuned, updates)
    if first and (step % 4 == 0 or step == steps - 1):
        print(f"step {step}: loss {float(loss):.3f}")


def greedy(params: lf.Params, prompt: str, count: int) -> str:
    """The likeliest token, again and again. The cache has the heads that the process has."""
    row = torch.tensor([tokenizer.encode(prompt)] * sizes["dp"])  # a row for each part of dp
    empty = lf.init_cache(params.config, (len(row),), max_len=row.shape[1] + count)
    row, cache = lf.mesh.shard((row, empty), mesh, PLAN)
    ids, new = row[0].tolist(), row
    for _ in range(count):
        logits, cache = lf.forward(params, new, cache)
        new = logits[:, -1:].argmax(-1)
        ids.append(int(new[0, 0]))
    return tokenizer.decode(ids)


for name, weights in (("before", params), ("after", tuned)):
    text = greedy(weights, "Long ago there was a brave little girl named", 24)
    if first:
        print(f"{name}: {text}")
