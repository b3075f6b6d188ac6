"""Train a model of the stories from nothing: the run of `llama-fn train`, step by step, on one page.

    python examples/train.py [FOLDER] [STEPS] [STORIES]

4000 steps on 200,000 stories give a model like the shipped one. After 300 steps on 20,000 stories a model already
writes sentences.
"""

import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import llama_fn as lf
from llama_fn.training.data import batch, encode_corpus, open_corpus
from llama_fn.training.jit_step import jit_step
from llama_fn.training.loop import deterministic, evaluate

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "my-stories")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 4000
stories = int(sys.argv[3]) if len(sys.argv) > 3 else 200_000

# Every random number comes from one key.
init, order, story_key, held_out = lf.random.split(lf.random.key(0), 4)

# Texts -> tokenizer -> a file of tokens, mapped into memory.
texts = [story.text for story in lf.stories.stories(story_key, stories)]
tokenizer = lf.train_tokenizer(texts[:5000], vocab_size=1024)
encode_corpus(texts, tokenizer, folder / "train.bin")
held_out = list(lf.stories.stories(held_out, 1000))
encode_corpus((story.text for story in held_out), tokenizer, folder / "valid.bin")
corpus, validation = (open_corpus(folder / f"{part}.bin", tokenizer, context=256) for part in ("train", "valid"))
floor = sum(story.bits for story in held_out) * math.log(2) / int(validation.predictions.sum())

# Parameters and optimizer state are trees; a step is a pure function of them and a batch.
config = lf.Config(dim=144, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=1024, hidden_dim=256, max_seq_len=256)
params = lf.init_params(init, config)
rate = lf.optim.warmup_cosine(peak=2e-3, warmup=min(100, steps // 4), steps=steps)
optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0),
                           lf.optim.adamw(rate, 0.9, 0.99, weight_decay=0.01, mask=lf.optim.matrices))
opt_state = optimizer.init(params)

# Compiled by its parts; the memory of the old parameters and state takes the new ones.
step = jit_step(optimizer)
with tqdm(range(steps), desc="compiling") as bar, deterministic():
    for i in bar:
        params, opt_state, metrics = step(params, opt_state, *batch(corpus, order, i, (1, 32)))
        bar.set_description("training")
        bar.set_postfix(loss=f"{float(metrics.loss):.4f}")

print(f"validation loss {evaluate(params, validation):.4f}, the grammar's entropy is {floor:.4f}")
model = lf.Model(params, tokenizer)
lf.save(model, folder)
(text,) = lf.text_completion(model, ["Once upon a time"], key=lf.random.key(0), echo=True)
print(text.text)
assert all(map(torch.equal, lf.tree.leaves(lf.load(folder).params), lf.tree.leaves(params)))
