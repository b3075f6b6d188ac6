"""Train a small model on the characters of a text, on the budget of nanoGPT's example for the CPU.

    python examples/characters.py TEXT [SEED] [STEPS]

The budget is 4 layers of width 128, 0.81 million parameters, and 2000 steps of 12 rows of 64 characters. The first nine
tenths of the text are for training. The loss is that of the whole last tenth, in blocks of 64 characters, in nats.
nanoGPT's README has 1.88 for tiny-shakespeare (AdamW, cosine decay); Muon with a linear decay to 0 reaches 1.56.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

import llama_fn as lf
from llama_fn.training.jit_step import jit_step

CONTEXT, BATCH = 64, 12
text = Path(sys.argv[1]).read_text()
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 2000
lf.keep_memory()

# Characters -> tokens -> rows, each with one token more than it predicts.
alphabet = sorted(set(text))
number = {character: i for i, character in enumerate(alphabet)}
tokens = torch.tensor([number[character] for character in text])
training, validation = tokens.split([len(tokens) * 9 // 10, len(tokens) - len(tokens) * 9 // 10])
blocks = validation.unfold(0, CONTEXT + 1, CONTEXT)

# Every random number comes from one key.
init, order = lf.random.split(lf.random.key(seed))
config = lf.Config(dim=128, n_layers=4, n_heads=4, n_kv_heads=4, vocab_size=len(alphabet), hidden_dim=344,
                   max_seq_len=CONTEXT)
params = lf.init_params(init, config)
rate = lf.optim.warmup_linear(peak=4e-3, warmup=steps // 40, steps=steps)
optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0), lf.optim.muon(rate, b2=0.99, weight_decay=0.0))
opt_state = optimizer.init(params)


def epoch(key: torch.Tensor) -> torch.Tensor:
    """The training text as rows in random order, cut at other places in each epoch."""
    cut, order = lf.random.split(key)
    rows = training[int(lf.random.randint(cut, (), 0, CONTEXT)):].unfold(0, CONTEXT + 1, CONTEXT)
    return rows[lf.random.permutation(order, len(rows))]


epochs = 1 + steps * BATCH // (len(training) // CONTEXT - 2)
rows = torch.cat([epoch(lf.random.fold_in(order, i)) for i in range(epochs)])
batches = rows[:steps * BATCH].unflatten(0, (steps, 1, BATCH))  # one micro-batch a step
mask = torch.ones_like(batches[0], dtype=torch.bool)
step = jit_step(optimizer)
with tqdm(batches, desc="compiling") as bar:
    for batch in bar:
        params, opt_state, metrics = step(params, opt_state, batch, mask)
        bar.set_description("training")
        bar.set_postfix(loss=f"{float(metrics.loss):.3f}")

with torch.no_grad():
    totals, counts = zip(*(lf.loss_sum(params, some) for some in blocks.split(256)), strict=True)
print(f"validation loss {float(sum(totals) / sum(counts)):.4f} ({config.n_params:,} parameters)")
