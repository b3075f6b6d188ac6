"""The cross-entropy where each device has its own part of the vocabulary: no device ever has all logits of a token."""

from typing import Any

import torch
from torch import Tensor

from llama_fn.mesh.collectives import copied, largest, summed
from llama_fn.mesh.sharded import place_in_part, vocabulary_over
from llama_fn.model.linear import linear
from llama_fn.model.norm import rms_norm


def entropy_of_parts(norm: Any, output: Any, x: Tensor, targets: Tensor, eps: float, z_loss: float = 0.0,
                     label_smoothing: float = 0.0) -> Tensor:
    """`cross_entropy`, up to rounding, of an output that a mesh axis divides along v.

    The devices send a few numbers a token, in place of the v logits (Shoeybi et al. 2019, section 3): the largest
    logit, the sum of exp, the target's logit, and for label smoothing the sum of the logits.
    """
    axis = vocabulary_over(output)
    assert axis is not None, "for an output that is divided along v"
    weight = output.gathered()
    logits = linear(weight, copied(rms_norm(norm, x, eps), axis))
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest = largest(exact.amax(-1), axis)
    log_sum_exp = highest + summed((exact - highest[..., None]).exp().sum(-1), axis).log()
    own, here = place_in_part(targets, weight.shape[0], axis)
    picked = exact.gather(-1, own.where(here, 0)[..., None])[..., 0].where(here, 0)
    nats = log_sum_exp - summed(picked, axis)
    if label_smoothing:
        mean = summed(exact.sum(-1), axis) / (weight.shape[0] * axis.size)
        nats = (1 - label_smoothing) * nats + label_smoothing * (log_sum_exp - mean)
    return nats + z_loss * log_sum_exp.square() if z_loss else nats
