"""Write a story, three ways: whole, in pieces, and by hand with nothing but `forward`.

    python examples/generate.py ["Once upon a time"]
"""

import sys

import torch

import llama_fn as lf

prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
model = lf.load("stories")
key = lf.random.key(0)  # randomness is an argument: the same key, the same story

# 1. Whole: a list of prompts gives a list of completions.
(completion,) = lf.text_completion(model, [prompt], key=key, sampler=lf.sampler(temperature=0.8), echo=True)
print(completion.text, end="\n\n")

# 2. In pieces, as they come.
print(prompt, end="")
for piece in lf.stream(model, prompt, key=key, sampler=lf.sampler(temperature=0.8)):
    print(piece, end="", flush=True)
print("\n")

# 3. By hand. The cache goes in and comes out; nothing is changed, so any cache can be continued again.
params, tokenizer = model
sample = lf.sampler(temperature=0.8)
tokens = tokenizer.encode(prompt)
cache = lf.init_cache(params.config, max_len=params.config.max_seq_len)
logits, cache = lf.forward(params, torch.tensor(tokens), cache)
while len(tokens) < params.config.max_seq_len:
    token = sample(lf.random.fold_in(key, len(tokens)), logits[-1])
    if token == tokenizer.eos_id:
        break
    tokens.append(int(token))
    logits, cache = lf.forward(params, token[None], cache)
print(tokenizer.decode(tokens))
