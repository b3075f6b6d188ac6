"""The linear map y = W x, computed fast: the first implementation in `TABLE` that accepts the arguments runs.

The definition is in `model/linear.py`. The model passes it in, and it runs if no implementation accepts. Every
implementation is tested against it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from llama_fn.modes import compiling
from llama_fn.ops.aten import linear as aten
from llama_fn.ops.aten.few_rows import Flat, accepts_few_rows, few_rows
from llama_fn.ops.aten.linear import in_pieces, packed, product, sum_of_products
from llama_fn.ops.cpu import linear as cpu
from llama_fn.ops.cpu.linear import by_cpp
from llama_fn.ops.gpu import linear as gpu
from llama_fn.ops.gpu.linear import by_triton
from llama_fn.ops.quantized import Grouped, Quantized
from llama_fn.ops.weight import Matrix, is_divided


class Implementation(NamedTuple):
    """A way to compute y = W x, and whether it accepts a matrix W "o d" and rows x "*b d".

    One that is `compiled` is only for compiled steps, and is skipped in eager mode.
    """

    compute: Callable[[Any, Tensor], Tensor]
    accepts: Callable[[Flat, Tensor], bool]
    compiled: bool = False


def choose(matrix: Flat, x: Tensor, definition: Callable[[Any, Tensor], Tensor]) -> Callable[[Flat, Tensor], Tensor]:
    """The first implementation of `TABLE` that accepts these arguments, or else the definition, which accepts any.

    Under `vmap` an axis is hidden, so what looks like a few rows may be many. Under a transform, and where gradients
    are recorded, torch's own product therefore runs.
    """
    compiled = compiling()
    for compute, accepts, compiled_only in TABLE:
        if (compiled or not compiled_only) and accepts(matrix, x):
            return compute
    return definition


def quantized_linear(weight: Quantized | Grouped, x: Tensor, inputs: int) -> Tensor:
    """The linear map y = W x of a quantized weight."""
    matrix, x = weight.flat(), x.flatten(-inputs)
    return choose(matrix, x, product)(matrix, x).unflatten(-1, weight.shape[:-inputs])


def several_linears(weights: Sequence[Matrix], x: Tensor) -> list[Tensor] | None:
    """The linear maps y = W x of several weights by one kernel, or None if no kernel accepts them all.

    A GPU finishes reading one small weight before it reaches full speed. On the CPU, each call has a fixed cost.
    """
    first: Any = weights[0]
    if all(map(is_divided, weights)):
        return first.several(weights, x)
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
    Implementation(few_rows, accepts_few_rows, compiled=True),
    Implementation(packed, aten.accepts_packed),
    Implementation(in_pieces, aten.accepts_in_pieces),
    Implementation(product, aten.accepts_product),
)
