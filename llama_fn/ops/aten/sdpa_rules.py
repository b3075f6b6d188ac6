"""Torch's flash attention on the CPU, as an operator that can also be mapped and differentiated again.

Torch's own operator (2.13) lacks both on the CPU: `vmap` runs it once for each example, with a warning, and a second
derivative raises. `llama_fn::flash` and `llama_fn::flash_backward` run the same kernels and have the missing rules.
They are this package's own, so torch's operators stay as they are. In a graph they become torch's. (Torch's kernels for
CUDA have the batching rule.)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from llama_fn import private
from llama_fn.modes import exporting, forward_mode, recorded, transforms
from llama_fn.ops.operators import LIBRARY

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accepts(*tensors: Tensor) -> bool:
    """Whether these queries, keys and values "b n t h" are mapped or differentiated, and torch would choose flash.

    An exported program, which must not need this package, contains torch's own operator.
    """
    needed = (transforms() > 0 or recorded(*tensors)) and not exporting()
    return needed and private.flash_attention_allowed() and all(
        x.device.type == "cpu" and x.dtype in DTYPES and x.numel() > 0 and x.stride(-1) == 1 for x in tensors)


def attend(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Torch's `scaled_dot_product_attention` by flash attention, causal where `visible` is None."""
    mask = None
    if visible is not None:
        mask = torch.zeros_like(visible, dtype=queries.dtype).masked_fill(~visible, -math.inf)
    return torch.ops.llama_fn.flash(queries, keys, values, visible is None, mask)[0]


def _flash(queries: Tensor, keys: Tensor, values: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, ...]:
    return private.flash_attention(queries, keys, values, 0.0, causal, attn_mask=mask)


def _flash_backward(cotangent: Tensor, queries: Tensor, keys: Tensor, values: Tensor, heads: Tensor,
                    logsumexp: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, ...]:
    return private.flash_attention_backward(cotangent, queries, keys, values, heads, logsumexp, 0.0, causal,
                                            attn_mask=mask)


def _mapped(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The batching rule of an operator "b n t h": the mapped axis is folded into the batch."""

    def rule(*args: Any) -> tuple[Tensor, ...]:
        *rest, mask = args
        level, size = private.level(), private.mapped_size()
        rows = next(x for x in rest if isinstance(x, Tensor)).shape[0]

        def fold(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x, axis = private.take_axis(x, level)
            return (x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)).flatten(0, 1)

        mask = None if mask is None else fold(mask.expand(rows, 1, *mask.shape[-2:]))
        with private.below_vmap():
            results = getattr(torch.ops.llama_fn, name)(*map(fold, rest), mask)
            return tuple(private.add_axis(x.unflatten(0, (size, rows)), level) for x in results)

    return rule


def pullback(cotangent: Tensor, queries: Tensor, keys: Tensor, values: Tensor, causal: bool,
             mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's derivative, written out: the cotangents of queries, keys and values, from that of the heads.

    With w = softmax(s), s = q k * scale and y = w v it is dv = w dy, dw = dy v, ds = w (dw - sum(w dw)), dq = ds k,
    dk = ds q (the softmax's Jacobian is diag(w) - w w). In float32 at least, as in the kernel.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    scale = 1 / math.sqrt(queries.shape[-1])
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


def _differentiated(queries: Tensor, keys: Tensor, values: Tensor, causal: bool,
                    mask: Tensor | None) -> tuple[Tensor, ...]:
    """`flash`, whose derivative is `flash_backward`."""
    inputs = queries, keys, values

    def kernel(*inputs: Tensor) -> tuple[Tensor, ...]:
        with private.below_autograd():
            return torch.ops.llama_fn.flash(*inputs, causal, mask)

    if not recorded(*inputs):
        return kernel(*inputs)
    with private.one_level_of_autograd():
        return _Flash.apply(kernel, causal, mask, *inputs)


def _differentiated_again(cotangent: Tensor, queries: Tensor, keys: Tensor, values: Tensor, heads: Tensor,
                          logsumexp: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, ...]:
    """`flash_backward`, whose derivative is that of `pullback`.

    `heads` and `logsumexp` are functions of the rest, and count as such.
    """
    inputs = cotangent, queries, keys, values
    if forward_mode():
        return pullback(*inputs, causal, mask)

    def kernel(*inputs: Tensor) -> tuple[Tensor, ...]:
        with private.below_autograd():
            return torch.ops.llama_fn.flash_backward(*inputs, heads, logsumexp, causal, mask)

    def definition(cotangent: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return pullback(cotangent, queries, keys, values, causal, mask)

    if not recorded(*inputs):
        return kernel(*inputs)
    with private.one_level_of_autograd():
        return _FlashBackward.apply(kernel, definition, *inputs)


class _Flash(private.OneLevelFunction):
    """The function `kernel(*xs)`, where `kernel` is flash attention. Its derivative is `flash_backward`.

    A level of torch.func is one call of a rule: `torch.autograd.Function` would begin again at the outermost.
    """

    @staticmethod
    def forward(kernel: Callable, causal: bool, mask: Tensor | None, *xs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():  # the levels further out ask whether they are to record
            return kernel(*xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        _, ctx.causal, mask, *xs = inputs
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*xs, *outputs, mask)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        *saved, mask = ctx.saved_tensors
        return None, None, None, *torch.ops.llama_fn.flash_backward(cotangents[0], *saved, ctx.causal, mask)


class _FlashBackward(private.OneLevelFunction):
    """The function `kernel(*xs)`, whose derivative is that of its definition."""

    @staticmethod
    def forward(kernel: Callable, definition: Callable, *xs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return kernel(*xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        _, ctx.definition, *xs = inputs
        ctx.save_for_backward(*xs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch.func.vjp(ctx.definition, *ctx.saved_tensors)[1](cotangents)


def _define(schema: str, kernel: Callable, differentiated: Callable) -> None:
    """Make an operator that is `kernel` in a graph, and has a rule for `vmap` and one for autograd."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeImplicitAutograd")
    LIBRARY.impl(name, differentiated, "AutogradCPU")
    if private.rules_can_be_set():
        LIBRARY.impl(name, _mapped(name), "FuncTorchBatched")


_define("flash(Tensor queries, Tensor keys, Tensor values, bool causal, Tensor? mask) -> (Tensor, Tensor)",
        _flash, _differentiated)
_define("flash_backward(Tensor cotangent, Tensor queries, Tensor keys, Tensor values, Tensor heads, Tensor logsumexp, "
        "bool causal, Tensor? mask) -> (Tensor, Tensor, Tensor)", _flash_backward, _differentiated_again)
