"""How results are compared: within a tolerance, and with finite differences."""

import math

import torch

import llama_fn as lf


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> bool:
    assert a.shape == b.shape and a.dtype == b.dtype
    return bool((a - b).abs().max() <= tolerance) if a.numel() else True


def direction_like(value, key):
    """A random direction of unit length over all leaves together."""
    noise = lf.tree.map_with_path(
        lambda path, x: lf.random.normal(lf.random.fold_in(key, sum(map(ord, path))), x.shape, x.dtype), value)
    norm = math.sqrt(sum(float(x.square().sum()) for x in lf.tree.leaves(noise)))
    return lf.tree.map(lambda x: x / norm, noise)


def finite_difference(f, at, direction, step: float = 1e-4):
    """The central difference of `f` along a direction: wrong by about step^2 = 1e-8."""
    ahead, behind = (f(lf.tree.map(lambda x, d: x + s * d, at, direction)) for s in (step, -step))  # noqa: B023
    return lf.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
