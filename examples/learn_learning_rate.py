"""The learning rate, learned: how training ends is a function of the rate, and has a derivative.

    python examples/learn_learning_rate.py

It goes through every step, every gradient and the optimizer's state (Maclaurin et al. 2015, "Gradient-based
hyperparameter optimization through reversible learning"); the second derivatives come by themselves.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

import llama_fn as lf


@lf.typed
def trained(rate: Float[Tensor, ""], params: lf.Params, batches: Int[Tensor, "steps b t"]) -> lf.Params:
    """The parameters after one step of AdamW on each batch."""
    optimizer = lf.optim.adamw(rate)
    state = optimizer.init(params)
    for batch in batches:
        updates, state = optimizer.update(torch.func.grad(lf.loss)(params, batch), state, params)
        params = lf.optim.apply_updates(params, updates)
    return params


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    texts = [story.text.replace(" the ", " a ") for story in lf.stories.stories(lf.random.key(1), 16)]
    batches = torch.tensor([tokenizer.encode(text)[:48] for text in texts]).unflatten(0, (4, 4))  # the last: held out
    log_rate, outer = torch.tensor(1e-4).log(), lf.optim.adamw(0.4)
    state = outer.init(log_rate)
    for _ in range(7):
        slope, loss = torch.func.grad_and_value(
            lambda x: lf.loss(trained(x.exp(), params, batches[:-1]), batches[-1]))(log_rate)
        print(f"rate {log_rate.exp():.5f}: held-out loss {loss:.3f}, its slope {slope:+.2f} an e-fold of the rate")
        updates, state = outer.update(slope, state, log_rate)
        log_rate = lf.optim.apply_updates(log_rate, updates)
