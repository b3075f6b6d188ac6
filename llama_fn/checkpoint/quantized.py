"""Quantized weights in files: the integers under the weight's name, and their scale under that name plus ".scale"."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from llama_fn.model.init import Weight
from llama_fn.ops.quantized import GROUP, Grouped, Quantized

SCALE = ".scale"
BITS = {torch.int8: "int8", torch.uint8: "int4"}
Entry = tuple[torch.dtype, tuple[int, ...]]


def entries(name: str, leaf: Quantized | Grouped) -> dict[str, Tensor]:
    """The entries that are written for a quantized weight: its integers as a matrix, and its scale."""
    values, scale = leaf.flat()
    return {name: values, name + SCALE: scale}


def expected(name: str, weight: Weight, kind: torch.dtype) -> dict[str, Entry]:
    """The dtype and shape of each entry of a quantized weight, given the dtype of its integers."""
    o, d = math.prod(weight.outer), math.prod(weight.inner)
    if kind == torch.int8:
        return {name: (kind, (o, d)), name + SCALE: (torch.float32, (o,))}
    return {name: (kind, (o, d // 2)), name + SCALE: (torch.bfloat16, (o, -(-d // GROUP), 2))}


def leaf(weight: Weight, values: Tensor, scale: Tensor) -> Quantized | Grouped:
    """The quantized weight that its two entries describe."""
    if values.dtype == torch.int8:
        return Quantized(values.reshape(weight.shape), scale.reshape(weight.outer))
    return Grouped(values.reshape(*weight.shape[:-1], -1), scale.reshape(*weight.outer, -1, 2))


def bits(kinds: Iterable[torch.dtype]) -> str:
    """The names of the quantizations with these integers: "int8", "int4", "int4 and int8", or an empty text."""
    return " and ".join(sorted({BITS[kind] for kind in kinds}))


def joined(leaves: dict[str, Tensor]) -> dict[str, Tensor | Quantized | Grouped]:
    """The weights by their paths. The two leaves of a quantized weight, its values and scale, are joined into one."""
    weights: dict[str, Tensor | Quantized | Grouped] = dict(leaves)
    for path in [path.removesuffix(".values") for path in leaves if path.endswith(".values")]:
        values, scale = leaves[f"{path}.values"], leaves[f"{path}.scale"]
        del weights[f"{path}.values"], weights[f"{path}.scale"]
        weights[path] = (Quantized if values.dtype == torch.int8 else Grouped)(values, scale)
    return weights
