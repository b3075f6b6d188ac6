"""For comparison only: a training step of the same model as `torch.nn` modules, the way most people write it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama_fn.bench.opacus import Transformer
from llama_fn.model.transformer import Params


def module_step(params: Params, tokens: Tensor) -> Callable[[], None]:
    """A step on rows of tokens: `torch.compile` of the loss, fused attention, clipping, and torch's fused AdamW."""
    module = Transformer(params.config).to(params.norm.device, params.norm.dtype)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4, fused=True)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    compiled = torch.compile(loss, dynamic=False)

    def step() -> None:
        optimizer.zero_grad()
        compiled().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return step
