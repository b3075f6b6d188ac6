"""The cross-entropy, a chunk of tokens at a time, so that the logits of a large vocabulary are never all in memory.

For 4,096 tokens and 32,000 words, logits in float32 take 500 MiB, and their gradient as much again. Each chunk's
logits are computed, used, freed, and computed again for the backward. `remat` makes this correct under every transform.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_fn.mesh.sharded import gathered_once
from llama_fn.modes import mapped
from llama_fn.transforms.tapped import Tapped

LOGITS = 2**24  # the most in memory at once: 64 MiB in float32


def too_many_logits(output: Any, x: Tensor) -> bool:
    """Whether to compute the logits of rows x in chunks. A `Tapped` weight may be used only once, so not in chunks."""
    return _logits(output, x[..., 0].numel()) > LOGITS and not isinstance(output, Tapped)


def in_chunks(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`f(norm, output, x, targets, ...)`, a number for each row of x, computed a chunk of rows at a time."""
    def chunked(norm: Any, output: Any, x: Tensor, targets: Tensor, *settings: float) -> Tensor:
        norm, output = gathered_once(norm), gathered_once(output)
        rows = max(1, LOGITS // _logits(output, 1))
        chunks = zip(x.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True)
        return torch.cat([f(norm, output, *chunk, *settings) for chunk in chunks]).reshape(targets.shape)

    return chunked


def _logits(output: Any, rows: int) -> int:
    """The number of logits of these rows, in all examples that `vmap` maps together."""
    return rows * output.shape[0] * mapped()
