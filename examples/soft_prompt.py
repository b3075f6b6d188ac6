"""Prefix tuning: teach a frozen model by the cache that it starts from (Li and Liang 2021).

    python examples/soft_prompt.py
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

import llama_fn as lf


@lf.typed
def prefix_loss(kv: tuple[tuple[Float[Tensor, "k s h"], ...], ...], length: Int[Tensor, ""], params: lf.Params,
                tokens: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """The mean of -log p over all tokens but a row's first, where each row continues one cache of these (k, v)."""
    logits, _ = torch.vmap(lf.forward, (None, 0, None))(params, tokens[:, :-1], lf.Cache(*kv, length))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    lesson = [story.text for story in lf.stories.stories(lf.random.key(1), 200) if "Zoe" in story.text][:8]
    tokens = torch.tensor([tokenizer.encode(text)[:32] for text in lesson])
    prompt = torch.tensor(tokenizer.encode("Long ago there was a brave little girl named"))
    (zoe,) = tokenizer.encode("Zoe", bos=False)

    # The prefix starts as the cache of real words. The slots after its length are for the rows; their gradients are 0.
    words, room = torch.tensor(tokenizer.encode("Once upon a time")), lf.init_cache(params.config, max_len=64)
    *kv, length = lf.forward(params, words, room)[1]
    kv, optimizer = tuple(kv), lf.optim.adamw(0.1, weight_decay=0.0)
    state = optimizer.init(kv)
    for step in range(21):
        grads, loss = torch.func.grad_and_value(prefix_loss)(kv, length, params, tokens)
        if step % 5 == 0:
            logits, _ = lf.forward(params, prompt, lf.Cache(*kv, length))
            print(f"step {step:2}: loss {loss:.3f}, p(Zoe | ... little girl named) = {logits[-1].softmax(-1)[zoe]:.3f}")
        updates, state = optimizer.update(grads, state, kv)
        kv = lf.optim.apply_updates(kv, updates)
