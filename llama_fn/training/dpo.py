"""Direct preference optimization: a loss of two trees, the policy that is trained and the reference that is not.

(Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model".)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_fn.mesh.sharded import total
from llama_fn.model.block import block
from llama_fn.model.transformer import Params
from llama_fn.ranges import number
from llama_fn.shapes import typed
from llama_fn.training.loss import ENTROPY, Entropy, row_nats


@typed
def dpo_loss(params: Params, reference: Params, chosen: tuple[Int[Tensor, "*b t"], Bool[Tensor, "*b t"]],
             rejected: tuple[Int[Tensor, "*b u"], Bool[Tensor, "*b u"]], *, beta: float,
             layer: Callable[..., Any] = block) -> Float[Tensor, ""]:
    """The mean over pairs of -log sigmoid(beta (r(chosen) - r(rejected))), where r is the answer's log-ratio.

    The log-ratio of an answer is log p(answer | prompt) under ``params``, the policy, minus the same under
    ``reference``. ``chosen`` and ``rejected`` are tokens and masks, as `lf.dialog_tokens` returns them or in batches.
    A mask is true at the answer's tokens, over which log p is summed. Behind the last of them, a row may hold any ids.
    Row i of both belongs to the same prompt; the two may have different lengths.

    Take gradients by ``params``: the reference is then a constant. For an adapter, the reference is the model without
    it, and takes no memory of its own. ``layer`` is that of `lf.forward`. Raises `ValueError` for a ``beta`` below 0 or
    not finite, and for the tokens that `lf.loss` refuses.

    Source: Rafailov et al. 2023, equation 7, https://arxiv.org/abs/2305.18290.

    >>> policy = lf.lora.apply(params, adapter)
    >>> loss = lf.dpo_loss(policy, params, chosen, rejected, beta=0.1)
    """
    better, worse = (_log_ratio(params, reference, *rows, layer, ENTROPY) for rows in (chosen, rejected))
    losses = _losses(better, worse, number("dpo_loss: beta", beta))
    return total(params.norm, losses.sum() / total(params.norm, torch.ones_like(losses).sum()))


@typed
def dpo_loss_sum(params: Params, reference: Params, tokens: Int[Tensor, "*b 2 t"], mask: Bool[Tensor, "*b 2 t"], *,
                 beta: float, layer: Callable[..., Any] = block,
                 entropy: Entropy = ENTROPY) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The sum of `dpo_loss` over the pairs, and their number; each pair is two rows, chosen and rejected.

    A pair without an answer in one of its rows does not count. With the number, micro-batches add up exactly. `entropy`
    is that of `loss_sum`.
    """
    chosen, rejected = _log_ratio(params, reference, tokens, mask, layer, entropy).unbind(-1)
    counts = mask[..., 1:].any(-1).all(-1)
    losses = _losses(chosen, rejected, number("dpo_loss_sum: beta", beta)).masked_fill(~counts, 0)
    return total(params.norm, losses.sum()), total(params.norm, counts.sum())


def _losses(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(x) = softplus(-x) of each pair."""
    return F.softplus(-beta * (chosen - rejected))


def _log_ratio(params: Params, reference: Params, tokens: Tensor, mask: Tensor, layer: Callable,
               entropy: Entropy) -> Tensor:
    """Of each row, log p(answer | prompt) under the policy minus that under the reference."""
    theirs, ours = (row_nats(model, tokens, mask, layer=layer, entropy=entropy) for model in (reference, params))
    return theirs - ours
