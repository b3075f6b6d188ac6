"""Attention, computed fast: the first implementation in `TABLE` that accepts the arguments runs.

The definition is in `model/attention.py`. The model passes it in, and it runs if no implementation accepts. Every
implementation is tested against it. The implementations are in `aten/`, `cpu/` and `gpu/`; this file only chooses.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.modes import by_layers, compiling, eager, forward_mode, transforms, twice
from llama_fn.ops.aten import attend as aten
from llama_fn.ops.aten.attend import fused, in_blocks, one_query
from llama_fn.ops.cpu import attend as cpu
from llama_fn.ops.cpu.attend import by_cpp, many_by_cpp
from llama_fn.ops.cpu.build import DTYPES
from llama_fn.ops.gpu.attend import by_triton
from llama_fn.ops.slots import Forked, visible

Attend = Callable[..., Tensor]  # a function of queries, keys, values and positions


class Implementation(NamedTuple):
    """A function that computes attention, and whether it accepts given queries, keys, values and positions.

    An implementation that is `compiled` is only for compiled steps, and is skipped in eager mode.
    """

    compute: Attend
    accepts: Callable[[Tensor, Tensor | Forked, Tensor | Forked, Tensor | None], bool]
    compiled: bool = False


def attend(definition: Attend, queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked,
           positions: Tensor | None, segments: Tensor | None = None) -> Tensor:
    """Attention by the first implementation of `TABLE` that accepts these arguments, or else by the definition.

    Only `fused` and the definition support segments.
    """
    if segments is not None:
        kernel: Attend = definition if _needs_definition(keys) else fused
        return kernel(queries, keys, values, positions, segments)
    compiled = compiling()
    for compute, accepts, compiled_only in TABLE:
        if (compiled or not compiled_only) and accepts(queries, keys, values, positions):
            return compute(queries, keys, values, positions)
    return on_visible_slots(definition)(queries, keys, values, positions)


def on_visible_slots(kernel: Attend) -> Attend:
    """The kernel, but the slots after a row's last position hold zeros, and keys and values have the queries' dtype.

    A kernel may multiply a masked slot by 0. If that slot held a NaN, the product would be NaN.
    """
    def attend(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> Tensor:
        if positions is not None:
            keys, values = visible(keys, positions), visible(values, positions)
        keys, values = (tree.map(lambda leaf: leaf.to(queries.dtype), part) for part in (keys, values))
        return kernel(queries, keys, values, positions)

    return attend


def _decodes(queries: Tensor, positions: Tensor | None) -> bool:
    """Whether this is a decode step: one query a row, and a cache."""
    return positions is not None and queries.shape[-2] == 1


def _needs_definition(keys: Tensor | Forked) -> bool:
    """Whether only the definition can compute this: for a forked cache, in forward mode, and for second derivatives.

    `fused` has a second derivative, too, but there it is 3 to 15 % slower, because it recomputes what it did not save.
    """
    return isinstance(keys, Forked) or forward_mode() or twice()


def _by_layers_without_derivatives(queries: Tensor, keys: Tensor | Forked) -> bool:
    """Whether `jit_layers` traces a step without derivatives and transforms, which our own kernels do not support."""
    return by_layers() and not queries.requires_grad and not transforms() and not _needs_definition(keys)


def _for_triton(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return (queries.is_cuda and _decodes(queries, positions) and queries.dtype != torch.float64
            and _by_layers_without_derivatives(queries, keys))


def _for_cpp(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return (_by_layers_without_derivatives(queries, keys) and queries.dtype in DTYPES
            and isinstance(keys, Tensor) and isinstance(values, Tensor) and cpu.supports(queries, keys, values))


def _for_cpp_one(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return _decodes(queries, positions) and _for_cpp(queries, keys, values, positions)


def _for_one_query(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return _decodes(queries, positions) and not _needs_definition(keys)


def _for_blocks(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    """Blocks take 0.8 of the time of one call for 256 tokens. For 512 tokens it is 0.75, and 0.5 with AVX2."""
    return (queries.device.type == "cpu" and queries.shape[-2] > aten.BLOCK and eager() and not transforms()
            and not _needs_definition(keys)
            and not any(isinstance(x, Tensor) and x.requires_grad for x in (queries, keys, values)))


def _for_fused(queries: Tensor, keys: Tensor | Forked, values: Tensor | Forked, positions: Tensor | None) -> bool:
    return not _needs_definition(keys)


TABLE = (
    Implementation(by_triton, _for_triton, compiled=True),
    Implementation(by_cpp, _for_cpp_one, compiled=True),
    Implementation(many_by_cpp, _for_cpp, compiled=True),
    Implementation(on_visible_slots(one_query), _for_one_query, compiled=True),
    Implementation(on_visible_slots(in_blocks), _for_blocks),
    Implementation(on_visible_slots(fused), _for_fused),
)
