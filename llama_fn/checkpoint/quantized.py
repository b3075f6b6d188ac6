"""Quantized weights in a file: the integers, a flat matrix, under the weight's name, and their scale beside it."""

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
    """What is written of a weight."""
    values, scale = leaf.flat()
    return {name: values, name + SCALE: scale}


def expected(name: str, weight: Weight, kind: torch.dtype) -> dict[str, Entry]:
    """Dtype and shape of a weight's entries, if its integers are of this kind."""
    o, d = math.prod(weight.outer), math.prod(weight.inner)
    if kind == torch.int8:
        return {name: (kind, (o, d)), name + SCALE: (torch.float32, (o,))}
    return {name: (kind, (o, d // 2)), name + SCALE: (torch.bfloat16, (o, -(-d // GROUP), 2))}


def leaf(weight: Weight, values: Tensor, scale: Tensor) -> Quantized | Grouped:
    """The weight of its entries."""
    if values.dtype == torch.int8:
        return Quantized(values.reshape(weight.shape), scale.reshape(weight.outer))
    return Grouped(values.reshape(*weight.shape[:-1], -1), scale.reshape(*weight.outer, -1, 2))


def bits(kinds: Iterable[torch.dtype]) -> str:
    """What weights of such integers are called: "int8", "int4", both, or nothing."""
    return " and ".join(sorted({BITS[kind] for kind in kinds}))


def together(leaves: dict[str, Tensor]) -> dict[str, Tensor | Quantized | Grouped]:
    """The leaves by their paths, those of a quantized weight as one."""
    whole = dict(leaves)
    for path in [path.removesuffix(".values") for path in leaves if path.endswith(".values")]:
        values, scale = whole.pop(f"{path}.values"), whole.pop(f"{path}.scale")
        whole[path] = (Quantized if values.dtype == torch.int8 else Grouped)(values, scale)
    return whole
