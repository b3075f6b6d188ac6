"""The linear map y = W x, computed fast: an ordered table of implementations, of which the first that accepts runs.

The definition stands in `model/linear.py`, and is the table's last row: the model hands it down. Every row is tested
against it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from llama_fn.modes import compiling
from llama_fn.ops.aten import linear as aten
from llama_fn.ops.aten.inductor_sums import Flat, accepts_few_rows, sums
from llama_fn.ops.aten.linear import in_pieces, packed, product, sum_of_products
from llama_fn.ops.cpu import linear as cpu
from llama_fn.ops.cpu.linear import by_cpp
from llama_fn.ops.gpu import linear as gpu
from llama_fn.ops.gpu.linear import by_triton
from llama_fn.ops.quantized import Grouped, Quantized
from llama_fn.ops.weight import Matrix


class Implementation(NamedTuple):
    """A way to compute y = W x, and whether it accepts a matrix W "o d" and rows x "*b d".

    A row that is `compiled` is for compiled steps alone, and is not asked in eager mode.
    """

    compute: Callable[[Any, Tensor], Tensor]
    accepts: Callable[[Flat, Tensor], bool]
    compiled: bool = False


def chosen(matrix: Flat, x: Tensor, definition: Callable[[Any, Tensor], Tensor]) -> Callable[[Flat, Tensor], Tensor]:
    """The first implementation of `TABLE` that accepts these; the definition, which computes everything, if none does.

    Under a transform an axis may be hidden, and few rows be many: there, and where gradients are recorded, torch's own
    product runs.
    """
    compiled = compiling()
    for compute, accepts, compiled_only in TABLE:
        if (compiled or not compiled_only) and accepts(matrix, x):
            return compute
    return definition


def integers(weight: Quantized | Grouped, x: Tensor, inputs: int) -> Tensor:
    """The linear map y = W x of a quantized weight."""
    matrix, x = weight.flat(), x.flatten(-inputs)
    return chosen(matrix, x, product)(matrix, x).unflatten(-1, weight.shape[:-inputs])


def together(weights: Sequence[Matrix], x: Tensor) -> list[Tensor] | None:
    """The linear maps y = W x of several weights by one kernel, or None if no kernel accepts them all.

    A GPU has read a small weight before it is at full speed; on the CPU each call costs time.
    """
    if not compiling():
        return None
    for accepts, kernel in ((gpu.accepts, gpu.several_by_triton), (cpu.accepts, cpu.several_by_cpp)):
        if all(accepts(weight, x) for weight in weights) and len(set(map(type, weights))) == 1:
            ys = kernel(weights, x)
            return [y.unflatten(-1, weight.shape[:-1]) for y, weight in zip(ys, weights, strict=True)]
    return None


TABLE = (
    Implementation(by_triton, gpu.accepts, compiled=True),
    Implementation(by_cpp, cpu.accepts, compiled=True),
    Implementation(sum_of_products, aten.accepts_one_row, compiled=True),
    Implementation(sums, accepts_few_rows, compiled=True),
    Implementation(packed, aten.accepts_packed),
    Implementation(in_pieces, aten.accepts_in_pieces),
    Implementation(product, aten.accepts_product),
)
