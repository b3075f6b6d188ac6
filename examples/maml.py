"""Parameters from which one step learns a new task: MAML (Finn et al. 2017, "Model-agnostic meta-learning").

    python examples/maml.py
"""

import re

import torch
from jaxtyping import Float, Int
from torch import Tensor

import llama_fn as lf


@lf.typed
def maml_loss(params: lf.Params, inner: lf.optim.Optimizer, support: Int[Tensor, "tasks b t"],
              query: Int[Tensor, "tasks b t"]) -> Float[Tensor, ""]:
    """The mean over tasks of the loss on its query after one inner step on its support (their equation 1)."""
    def after(support: Tensor, query: Tensor) -> Tensor:
        updates, _ = inner.update(torch.func.grad(lf.loss)(params, support), inner.init(params), params)
        return lf.loss(lf.optim.apply_updates(params, updates), query)

    return torch.vmap(after)(support, query).mean()


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    texts = [story.text for story in lf.stories.stories(lf.random.key(1), 8)]
    names = ("Ada", "Eve", "Ivy", "Una", "Ina", "Uma")  # a task: a new name for every story's hero
    renamed = [[re.sub(r"(named|called) \w+", rf"\1 {name}", text, count=1) for text in texts] for name in names]
    tasks = torch.tensor([[tokenizer.encode(text)[:24] for text in task] for task in renamed])
    support, query = tasks.split(4, dim=1)
    inner, outer = lf.optim.sgd(0.02), lf.optim.adamw(1e-3)
    state = outer.init(params)
    for step in range(10):
        before, after = lf.loss(params, query[4:]), maml_loss(params, inner, support[4:], query[4:])
        print(f"meta-step {step:2}: two names never seen have loss {before:.3f}, after one step {after:.3f}")
        grads = torch.func.grad(maml_loss)(params, inner, support[:4], query[:4])
        updates, state = outer.update(grads, state, params)
        params = lf.optim.apply_updates(params, updates)
