"""The linear map y = W x, computed fast: an ordered table of implementations, of which the first that accepts runs.

The definition stands in `model/linear.py`, and is the table's last row: the model hands it down. Every row is tested
against it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama_fn import tree
from llama_fn.modes import by_layers, compiling, transforms, under_dynamo
from llama_fn.ops.aten.inductor_sums import FEW, Flat, in_memory, sums, whole_words
from llama_fn.ops.cpu import build as avx2
from llama_fn.ops.quantized import Grouped, Quantized, dequantized
from llama_fn.ops.weight import Matrix
from llama_fn.private import multiplies_bfloat16, times_bytes
from llama_fn.shapes import typed

PIECE = 1024  # outputs of a weight that are made float32 at a time: some megabytes, which stay in the cache
HAS_BFLOAT16 = multiplies_bfloat16()


class Implementation(NamedTuple):
    """A way to compute y = W x, and whether it accepts a matrix W "o d" and rows x "*b d".

    A row that is `compiled` is for compiled steps alone, and is not asked in eager mode.
    """

    compute: Callable[[Flat, Tensor], Tensor]
    accepts: Callable[[Flat, Tensor], bool]
    compiled: bool = False


def chosen(matrix: Flat, x: Tensor, definition: Callable[[Flat, Tensor], Tensor]) -> Callable[[Flat, Tensor], Tensor]:
    """The first implementation of `TABLE` that accepts these; the definition, which computes everything, if none does.

    Under a transform an axis may be hidden, and few rows be many: there, and where gradients are recorded, torch's own
    product runs.
    """
    for compute, accepts, _ in TABLE if compiling() else EAGER:
        if accepts(matrix, x):
            return compute
    return definition


def integers(weight: Quantized | Grouped, x: Tensor, inputs: int) -> Tensor:
    """y = W x for integers W."""
    matrix, x = weight.flat(), x.flatten(-inputs)
    return chosen(matrix, x, product)(matrix, x).unflatten(-1, weight.shape[:-inputs])


def together(weights: Sequence[Matrix], x: Tensor) -> list[Tensor] | None:
    """y = W x for several weights by one kernel, if one takes them all: a GPU is not at its speed before a small weight
    is read, and a kernel in C++ is called less often.
    """
    if not compiling():
        return None
    for accepts, kernel in ((_for_triton, _by_triton), (_for_cpp, _by_cpp)):
        if all(accepts(weight, x) for weight in weights) and len(set(map(type, weights))) == 1:
            ys = kernel(weights, x)
            return [y.unflatten(-1, weight.shape[:-1]) for y, weight in zip(ys, weights, strict=True)]
    return None


def _values_alone(x: Tensor) -> bool:
    return not x.requires_grad and not transforms()


def _for_sum_of_products(matrix: Flat, x: Tensor) -> bool:
    return x.device.type != "cpu" and x.shape[:-1].numel() == 1 and _values_alone(x)


def _for_sums(matrix: Flat, x: Tensor) -> bool:
    return (x.device.type == "cpu" and 0 < x.shape[:-1].numel() <= FEW
            and (isinstance(matrix, Tensor) or whole_words(matrix)) and _values_alone(x))


def _for_packed(matrix: Flat, x: Tensor) -> bool:
    """Of widths that 16 does not divide, torch's kernel reads beyond the end and is wrong (torch 2.13)."""
    return (isinstance(matrix, Quantized) and x.device.type == "cpu" and x.dtype == torch.bfloat16
            and matrix.values.is_contiguous() and 1 < x.shape[:-1].numel() <= 64 and x.shape[-1] % 16 == 0
            and _values_alone(x))


def _for_in_pieces(matrix: Flat, x: Tensor) -> bool:
    slow = x.dtype == torch.bfloat16 and not HAS_BFLOAT16 and x.shape[:-1].numel() > FEW
    return (slow or isinstance(matrix, Grouped)) and x.device.type == "cpu" and _values_alone(x)


def _for_product(matrix: Flat, x: Tensor) -> bool:
    return not isinstance(matrix, Tensor) or matrix.dtype == x.dtype


@typed
def product(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out`, by torch's own matrix product."""
    rows = x.reshape(-1, x.shape[-1])  # compiled, rows that lie apart would each be multiplied by themselves
    if isinstance(weight, Quantized):  # 8 bits are exact in bfloat16
        exact = torch.promote_types(x.dtype, torch.float32)
        y = (F.linear(rows, weight.values.to(x.dtype)).to(exact) * weight.scale).to(x.dtype)
    else:
        y = F.linear(rows, dequantized(weight, x.dtype) if isinstance(weight, Grouped) else weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@typed
def sum_of_products(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for one row on a GPU, in the words that inductor makes one loop of, and of several weights that
    take the same row one loop, too."""
    exact = torch.promote_types(x.dtype, torch.float32)
    row = in_memory(x).reshape(-1).to(exact)
    if isinstance(weight, Quantized):
        y = (weight.values.to(exact) * row).sum(-1) * weight.scale
    else:
        y = ((dequantized(weight, exact) if isinstance(weight, Grouped) else weight.to(exact)) * row).sum(-1)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@typed
def by_triton(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows on a GPU, by a kernel of `ops/gpu`, which reads a weight once."""
    return _by_triton([weight], x)[0]


def _by_triton(weights: Sequence[Tensor | Quantized], x: Tensor) -> list[Tensor]:
    from llama_fn.ops.gpu import linear_few_rows as gpu_sums
    from llama_fn.ops.gpu import linear_one_row as gpu_row  # noqa: F401  they import triton, which is only where there is a GPU

    weights = [weight.flatten(0, -2) if isinstance(weight, Tensor) else weight.flat() for weight in weights]
    values = [weight.values if isinstance(weight, Quantized) else weight for weight in weights]
    scales = [weight.scale for weight in weights if isinstance(weight, Quantized)]
    rows, outputs = x.reshape(-1, x.shape[-1]), [len(value) for value in values]
    if len(rows) == 1:
        y = torch.ops.llama_fn.row(values, scales, rows)
        ys = y.split(outputs, -1) if len(outputs) > 1 else [y]
    else:
        ys = torch.ops.llama_fn.sums(values, rows, gpu_sums.share(values, rows)).sum(0).split(outputs, -1)  # "p b o"
        ys = [y * scale for y, scale in zip(ys, scales, strict=True)] if scales else ys
    return [y.to(x.dtype).reshape(*x.shape[:-1], -1) for y in ys]


def _for_triton(weight: Flat, x: Tensor) -> bool:
    """Whether `by_triton` takes these: in a compiled step, whose arguments the weights are, 16 bits times 16 bits or
    times bytes, of as few rows as it is faster for than torch.
    """
    if not x.is_cuda or under_dynamo():
        return False
    values = weight.values if isinstance(weight, Quantized) else weight
    scaled = not isinstance(weight, Quantized) or weight.scale.is_contiguous()
    return (isinstance(values, Tensor) and values.is_contiguous() and scaled and values.dtype in (x.dtype, torch.int8)
            and x.dtype in (torch.bfloat16, torch.float16) and 0 < x.shape[:-1].numel() <= most_by_triton(weight)
            and not transforms() and not x.requires_grad)


def most_by_triton(weight: Matrix) -> int:
    """The rows for which these kernels are the fastest."""
    return 64 if isinstance(weight, Quantized) else 16


@typed
def by_cpp(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows on the CPU, by a kernel in C++ (see `ops/cpu`)."""
    return _by_cpp([weight], x)[0]


def _by_cpp(weights: Sequence[Flat], x: Tensor) -> list[Tensor]:
    ys = avx2.sums(weights, x.reshape(-1, x.shape[-1]))
    return [y.to(x.dtype).reshape(*x.shape[:-1], -1) for y in ys]


def _for_cpp(weight: Flat, x: Tensor) -> bool:
    """Whether `by_cpp` takes these: in a compiled step, since a compiler makes it."""
    return by_layers() and avx2.takes(weight, x) and _values_alone(x)


@typed
def in_pieces(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` in float32, a piece of the weight after the other: for 512 rows of bfloat16 160 GFLOP/s where a
    processor without such products reaches 21 (two cores, AVX2)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    columns, parts = x.reshape(-1, x.shape[-1]).to(exact).mT, []  # W x^T: a tenth faster than x W^T
    for at in range(0, weight.shape[0], PIECE):
        piece = tree.map(lambda leaf, at=at: leaf[at:at + PIECE], weight)
        parts.append((piece.to(exact) if isinstance(piece, Tensor) else dequantized(piece, exact)) @ columns)
    return torch.cat(parts).mT.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@typed
def packed(weight: Quantized, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` of an 8-bit weight and bfloat16 rows by torch's kernel, which makes no bfloat16 matrix of it."""
    rows, scale = in_memory(x.reshape(-1, x.shape[-1])), in_memory(weight.scale.to(x.dtype))  # inductor has them there
    rows = times_bytes(rows, weight.values, scale)
    return rows.reshape(*x.shape[:-1], -1)


TABLE = (
    Implementation(by_triton, _for_triton, compiled=True),
    Implementation(by_cpp, _for_cpp, compiled=True),
    Implementation(sum_of_products, _for_sum_of_products, compiled=True),
    Implementation(sums, _for_sums, compiled=True),
    Implementation(packed, _for_packed),
    Implementation(in_pieces, _for_in_pieces),
    Implementation(product, _for_product),
)
EAGER = tuple(row for row in TABLE if not row.compiled)
