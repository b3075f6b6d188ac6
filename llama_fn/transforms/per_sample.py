"""Per-sample gradients, their norms, and sums of clipped gradients.

A loss is any function ``loss(params, *example)`` that returns a scalar. A batch is a tuple of the arguments of all
examples, or the only argument; the first axis of each of its tensors is that of the samples. Nothing here compiles:
`jit` accepts any function that calls these.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama_fn import random, tree
from llama_fn.model.transformer import Params
from llama_fn.modes import concrete
from llama_fn.ops.weight import on_one_device, with_all_rows
from llama_fn.random import Key
from llama_fn.ranges import number
from llama_fn.shapes import typed
from llama_fn.transforms.tapped import Tapped, whole_observed

Loss = Callable[..., Tensor]


@typed
def per_sample_grads(loss: Loss, params: Any, batch: Any, *, chunk_size: int | None = None) -> Any:
    """The gradient of each sample, ``vmap(grad(loss))``: a tree like ``params`` with a first axis of samples.

    ``chunk_size`` samples are computed at once; None is all of them. Raises `ValueError` for a batch without samples,
    and for tensors with different numbers of them.

    >>> each = lf.per_sample_grads(lf.loss, params, batch)
    """
    with_all_rows("per_sample_grads", params)
    return _mapped(torch.func.grad(loss), params, batch, chunk_size)


@typed
def per_sample_norms(loss: Loss, params: Any, batch: Any, *, chunk_size: int | None = None) -> Float[Tensor, "b"]:
    """The norm of each sample's gradient, in float32 at least, by one backward that makes no gradient of a weight.

    Where ``params`` are `Params`, the norms are measured where the model uses each weight (see ``transforms/tapped.py``
    for the papers). A ``loss`` that uses a weight in another way, twice, or inside a transform of its own (``vmap``,
    ``grad``, ``jvp``, or a `remat` that closes over it) is a `ValueError`; a layer inside `remat` runs without it. For
    any other tree and any loss, each leaf's gradients are computed for all samples, squared and dropped.

    ``chunk_size`` samples are computed at once; None is all of them. The norm of an infinite or NaN gradient is
    infinite or NaN.

    >>> norms = lf.per_sample_norms(lf.loss, params, batch)
    """
    on_one_device("per_sample_norms", params)
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tree.leaves(params)], torch.float32)
    zero = torch.zeros((), dtype=dtype, device=tree.leaves(params)[0].device)

    def square(params: Any, *example: Any) -> Tensor:
        def measured(tap: Tensor) -> Tensor:
            def tapped(path: str, weight: Tensor) -> Any:
                return Tapped(weight, tap, path) if isinstance(params, Params) else whole_observed(weight, tap)

            return loss(tree.map_with_path(tapped, params), *example)

        return torch.func.grad(measured)(zero)

    return _mapped(square, params, batch, chunk_size).clamp(min=0).sqrt()  # rounding may make a sum below zero


@typed
def clipped_sum(loss: Loss, params: Any, batch: Any, max_norm: float, *, chunk_size: int | None = None) -> Any:
    """The sum of the samples' gradients, each scaled down to a norm of at most ``max_norm``; "ghost clipping".

    No gradient of a sample is held: a first backward measures the norms (`per_sample_norms`), and a second one
    differentiates the sum of the losses, each times its factor (Li et al. 2022).

    A sample with an infinite or NaN gradient is left out, so that the sum is finite and no sample changes it by more
    than ``max_norm``. In eager mode a warning says how many there were. ``chunk_size`` samples are computed at once;
    None is all of them. Sums of several batches add up, and the sum of no samples is 0. Raises `ValueError` as
    `per_sample_norms` does, and for a ``max_norm`` that is not positive.

    >>> total = lf.clipped_sum(lf.loss, params, batch, max_norm=1.0)
    """
    on_one_device("clipped_sum", params)
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}; math.inf clips nothing")
    max_norm = number("max_norm", max_norm, above=True, below=False)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    count = _samples(batch)
    size = chunk_size or max(count, 1)

    def added(total: Any, start: int) -> Any:
        chunk = tree.map(lambda x: x[start:start + size], batch)
        norms = per_sample_norms(loss, params, chunk)
        finite = norms.isfinite()
        if concrete(norms) and (lost := len(norms) - int(finite.sum())):
            warnings.warn(f"clipped_sum: {lost} of {len(norms)} samples have an infinite or NaN gradient, and count as "
                          "none; per_sample_norms tells which", stacklevel=2)
        # A factor of 0 does not remove an infinite gradient, since 0 * infinity is NaN. So a finite sample takes the
        # place of each sample whose gradient is not finite, and its factor there is 0.
        places = torch.arange(len(norms), device=norms.device).where(finite, finite.int().argmax())
        chunk = tree.map(lambda x: x[places.to(x.device)], chunk)
        factors = (max_norm / norms).clamp(max=1).where(finite, 0)
        clipped = torch.func.grad(lambda params: (_mapped(loss, params, chunk) * factors).sum())(params)
        return tree.map(lambda old, new: old + new.where(finite.any(), 0), total, clipped)

    return functools.reduce(added, range(0, count, size), tree.map(torch.zeros_like, params))


@typed
def private_grads(loss: Loss, params: Any, batch: Any, *, max_norm: float, noise_multiplier: float,
                  key: Key, expected_batch_size: float | None = None, chunk_size: int | None = None) -> Any:
    """The mean gradient of a batch, made private (DP-SGD: Abadi et al. 2016, algorithm 1), as a tree like ``params``.

    It is the sum of the clipped gradients, plus normal noise of deviation ``noise_multiplier * max_norm``, divided by
    ``expected_batch_size``. Where each sample is drawn with a probability, pass that probability times their number,
    since the size of the draw is itself private; None is the size of this batch. A sample without a gradient (all
    masked) counts as zero, and so does one with an infinite or NaN gradient. A batch without samples gives noise alone.
    ``chunk_size`` is that of `clipped_sum`.

    The noise depends on the key alone, and whoever knows the key can subtract it: draw it from a secret seed, and use
    it once. Raises `ValueError` as `clipped_sum` does, for negative noise, and for noise with an infinite ``max_norm``.

    >>> noisy = lf.private_grads(lf.loss, params, batch, max_norm=1.0, noise_multiplier=1.0, key=key)
    """
    on_one_device("private_grads", params)
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be a number from 0 on, got {noise_multiplier}")
    noise_multiplier = number("noise_multiplier", noise_multiplier)
    if noise_multiplier > 0 and max_norm == math.inf:
        raise ValueError(f"noise of {noise_multiplier} times an infinite max_norm; private gradients must be clipped")
    size = _samples(batch) if expected_batch_size is None else expected_batch_size
    if not 0 < size < math.inf:
        raise ValueError(f"expected_batch_size must be positive, got {size}")
    total = clipped_sum(loss, params, batch, max_norm, chunk_size=chunk_size)
    keys = iter(random.split(key, len(tree.leaves(total))))

    def noisy(g: Tensor) -> Tensor:
        upcast = g.to(torch.promote_types(g.dtype, torch.float32))
        if noise_multiplier > 0:
            noise = random.normal(next(keys).to(g.device), g.shape, upcast.dtype)
            upcast = upcast + noise_multiplier * float(max_norm) * noise
        return (upcast / size).to(g.dtype)

    return tree.map(noisy, total)


def _samples(batch: Any, least: int = 0) -> int:
    """The number of samples of a batch. Raises `ValueError` if its tensors differ in it, and for fewer than `least`."""
    shapes: dict[str, tuple[int, ...]] = {path: tuple(getattr(x, "shape", ())) for path, x in tree.paths(batch).items()}
    counts = {shape[:1] for shape in shapes.values()}
    if len(counts) != 1 or not all(counts) or min(counts) < (least,):
        shown = ", ".join(f"{path or 'it'} is {list(shape)}" for path, shape in shapes.items()) or "it has none"
        raise ValueError("the tensors of a batch have a first axis of samples, as many in each"
                         f"{' and at least one' * (least > 0)}: {shown}")
    return next(iter(counts))[0]


def _mapped(f: Callable, params: Any, batch: Any, chunk_size: int | None = None) -> Any:
    """The results of `f(params, *example)` for all examples, along a first axis."""
    _samples(batch, least=1)
    batch = batch if type(batch) is tuple else (batch,)
    return torch.vmap(f, (None, *tree.map(lambda x: 0, batch)), chunk_size=chunk_size)(params, *batch)
