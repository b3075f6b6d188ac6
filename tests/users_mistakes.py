"""Mistakes that a type checker shows a user. `test_types.py` expects an error in each line that says so."""

import torch

import llama_fn as lf

model = lf.load("stories")
params, tokenizer = model
tokens = torch.tensor(tokenizer.encode("Once"))
cache = lf.init_cache(params.config, max_len=9)

lf.forward(params)  # wrong
lf.forward(params, tokens, 5)  # wrong
lf.forward(tokens, params)  # wrong
print(lf.forward(params, tokens)[1].length)  # wrong
print(lf.forward(params, tokens, cache)[1].size)  # wrong
print(lf.jit(lf.forward)(params, tokens)[1].length)  # wrong
print(lf.jit_layers()(params, tokens)[1].length)  # wrong
print(torch.vmap(lf.forward, (None, 0))(params, tokens)[1].length)  # wrong
lf.stream(model, "x")  # wrong
lf.sampler(temperature="hot")  # wrong
lf.sampler(top_k=0.5)  # wrong
lf.init_cache(params.config)  # wrong
params.blocks[0].attention.wq + "1"  # wrong
print(params.blocks[0].w1)  # wrong
lf.random.uniform(0, (3,))  # wrong
lf.save(model, "folder", format="zip")  # wrong
lf.Config(48, 2, 6)  # wrong


@lf.typed
def doubled(x: torch.Tensor) -> torch.Tensor:
    """A function of one's own keeps its signature."""
    return x + x


doubled(3)  # wrong
doubled(tokens, tokens)  # wrong
print(doubled(tokens).size)  # right, as are the calls that it is made of
