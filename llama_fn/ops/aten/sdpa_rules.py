"""What torch's fused attention lacks on the CPU (2.13): a batching rule, and derivatives of its derivative.

Importing this package registers both with torch's own operator, for the whole process. A user's own call of
`scaled_dot_product_attention` on the CPU then runs once under `vmap`, where torch alone loops and warns, and can be
differentiated twice, where torch alone raises. No value changes that torch alone computes. (Torch's kernels for CUDA
have the batching rule, but not the derivatives.)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from llama_fn import private
from llama_fn.modes import forward_mode

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = f"{FORWARD}_backward"


def folded(kernel: Callable) -> Callable[..., tuple[Tensor, ...]]:
    """The batching rule of a kernel "b n t h": the mapped axis is folded into the batch, and the kernel runs once."""

    def rule(queries: Tensor, *rest: Any, attn_mask: Tensor | None = None, **scale: Any) -> tuple[Tensor, ...]:
        level, size = private.level(), private.mapped_size()
        rows = queries.shape[0]

        def fold(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x, axis = private.take_axis(x, level)
            return (x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)).flatten(0, 1)

        mask = None if attn_mask is None else fold(attn_mask.expand(rows, 1, *attn_mask.shape[-2:]))
        with private.below_vmap():
            results = kernel(*map(fold, (queries, *rest)), attn_mask=mask, **scale)
            return tuple(private.add_axis(x.unflatten(0, (size, rows)), level) for x in results)

    return rule


def pullback(cotangent: Tensor, queries: Tensor, keys: Tensor, values: Tensor, causal: bool, mask: Tensor | None,
             scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's derivative, written out: the cotangents of queries, keys and values, from that of the heads.

    With w = softmax(s), s = q k * scale and y = w v it is dv = w dy, dw = dy v, ds = w (dw - sum(w dw)), dq = ds k,
    dk = ds q (the softmax's Jacobian is diag(w) - w w). In float32 at least, as in the kernel.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    q, dy = (rearrange(x.to(exact), "b (k g) t h -> b k g t h", k=keys.shape[1]) for x in (queries, cotangent))
    k, v = keys.to(exact), values.to(exact)
    scores = einsum(q, k, "b k g t h, b k s h -> b k g t s") * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0, 0], dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores + mask[:, :, None]
    weights = scores.softmax(-1)
    dv = einsum(weights, dy, "b k g t s, b k g t h -> b k s h")
    dw = einsum(dy, v, "b k g t h, b k s h -> b k g t s")
    ds = weights * (dw - (weights * dw).sum(-1, keepdim=True)) * scale
    dq = rearrange(einsum(ds, k, "b k g t s, b k s h -> b k g t h"), "b k g t h -> b (k g) t h")
    dk = einsum(ds, q, "b k g t s, b k g t h -> b k s h")
    return dq.to(queries.dtype), dk.to(keys.dtype), dv.to(values.dtype)


def derivative(cotangent: Tensor, queries: Tensor, keys: Tensor, values: Tensor, heads: Tensor, logsumexp: Tensor,
               dropout: float, causal: bool, attn_mask: Tensor | None = None,
               scale: float | None = None) -> tuple[Tensor, ...]:
    """The kernel's derivative where it may be differentiated again: itself, with a derivative by `pullback`.

    `heads` and `logsumexp` are functions of the rest, and count as such.
    """
    inputs = cotangent, queries, keys, values
    if forward_mode():
        return pullback(*inputs, causal, attn_mask, scale)

    def kernel(*inputs: Tensor) -> tuple[Tensor, ...]:
        with private.below_autograd():
            return getattr(torch.ops.aten, BACKWARD)(*inputs, heads, logsumexp, dropout, causal, attn_mask=attn_mask,
                                                     scale=scale)

    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return kernel(*inputs)
    with private.one_level_of_autograd():
        return _Derivative.apply(
            kernel, lambda *inputs: pullback(*inputs, causal, attn_mask, scale), *inputs)


class _Derivative(private.OneLevelFunction):
    """`kernel(*xs)`, whose own derivative is that of its definition.

    A level of torch.func is one call of the rule: `torch.autograd.Function` would begin again at the outermost.
    """

    @staticmethod
    def forward(kernel: Callable, definition: Callable, *xs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():  # the levels further out ask whether they are to record
            return kernel(*xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        _, ctx.definition, *xs = inputs
        ctx.save_for_backward(*xs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch.func.vjp(ctx.definition, *ctx.saved_tensors)[1](cotangents)


def register() -> torch.library.Library:
    """Register the rules with torch's dispatcher, for as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")
    for name in (FORWARD, BACKWARD):
        if private.rules_can_be_set() and not private.has_batching_rule(name):
            library.impl(name, folded(getattr(torch.ops.aten, name).default), "FuncTorchBatched")
    library.impl(BACKWARD, derivative, "AutogradCPU")
    return library
