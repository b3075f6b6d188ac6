"""The linear map: the written-out definition, and the kernels that compute it, for every kind of weight.

A weight is a tensor, or a `NamedTuple` that stands in a tensor's place in the tree and says what is to be computed
instead of W x. The rest of the model does not notice.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llama_fn import tree
from llama_fn.modes import transforms
from llama_fn.ops.aten.inductor_sums import FEW, Matrix, in_memory, sums, whole_words
from llama_fn.ops.cpu import build as avx2
from llama_fn.ops.quantized import Grouped, Quantized, dequantized
from llama_fn.private import multiplies_bfloat16, times_bytes
from llama_fn.shapes import typed
from llama_fn.transforms.tapped import Tapped, linear_observed


class Adapted(NamedTuple):
    """W + B A, where B and A are thin: x goes through W and, beside it, through A, then B (Hu et al. 2021, eq. 3)."""

    weight: Any  # a weight of any kind
    a: Float[Tensor, "_ ..."] | Tapped
    b: Float[Tensor, "... _"] | Tapped

    @property
    def shape(self) -> tuple[int, ...]:
        """That of W."""
        return self.weight.shape


if TYPE_CHECKING:
    Kind = Tensor  # so that `params.output + 1` is right, which for nearly all parameters it is
else:
    Kind = Adapted | Tapped | Quantized | Grouped  # of a weight that is no tensor
PIECE = 1024  # outputs of a weight that are made float32 at a time: some megabytes, which stay in the cache
HAS_BFLOAT16 = multiplies_bfloat16()


@typed
def linear(weight: Float[Tensor, "..."] | Kind, x: Float[Tensor, "..."], inputs: int = 1) -> Float[Tensor, "..."]:
    """`written_out`, where the last `inputs` axes of the weight and of x together are d, and the weight's others o."""
    if isinstance(weight, Adapted):
        return linear(weight.weight, x, inputs) + linear(weight.b, linear(weight.a, x, inputs))
    if isinstance(weight, Tapped):
        plain, tap = weight.use()
        return linear_observed(linear(plain, x, inputs), x.flatten(-inputs), tap, len(plain.shape) - inputs)
    matrix, x = _matrix(weight, inputs), x.flatten(-inputs)
    return _kernel(matrix, x)(matrix, x).unflatten(-1, weight.shape[:-inputs])


def linears(weights: Sequence[Tensor | Kind], x: Float[Tensor, "..."]) -> list[Float[Tensor, "..."]]:
    """`linear` of each; where a kernel takes several at once, by that: a GPU is not at its speed before a small weight
    is read, and a kernel in C++ is called less often.
    """
    for chosen, kernel in ((_for_triton, _by_triton), (_for_cpp, _by_cpp)):
        if all(chosen(weight, x) for weight in weights) and len(set(map(type, weights))) == 1:
            ys = kernel(weights, x)
            return [y.unflatten(-1, weight.shape[:-1]) for y, weight in zip(ys, weights, strict=True)]
    return [linear(weight, x) for weight in weights]


def _matrix(weight: Tensor | Quantized | Grouped, inputs: int) -> Matrix:
    return weight.reshape(-1, math.prod(weight.shape[-inputs:])) if isinstance(weight, Tensor) else weight.flat()


def _kernel(matrix: Matrix, x: Tensor) -> Callable[[Matrix, Tensor], Tensor]:
    """Torch's product, but for rows of which nothing is mapped or differentiated: in a compiled step of a few, kernels
    that read a weight once; and on the CPU, where torch has no good product, one of float32 pieces.

    Under a transform an axis may be hidden, and few rows be many.
    """
    rows, d = x.shape[:-1].numel(), x.shape[-1]
    if transforms() or x.requires_grad:
        return product
    if _for_triton(matrix, x):
        return by_triton
    if _for_cpp(matrix, x):
        return by_cpp
    if x.device.type != "cpu":
        return sum_of_products if torch.compiler.is_compiling() and rows == 1 else product
    if torch.compiler.is_compiling() and 0 < rows <= FEW and (isinstance(matrix, Tensor) or whole_words(matrix)):
        return sums
    if (isinstance(matrix, Quantized) and matrix.values.is_contiguous() and x.dtype == torch.bfloat16
            and 1 < rows <= 64 and d % 16 == 0):
        return packed  # of widths that 16 does not divide, it reads beyond the end and is wrong (torch 2.13)
    if isinstance(matrix, Grouped) or (rows > FEW and x.dtype == torch.bfloat16 and not HAS_BFLOAT16):
        return in_pieces
    return product


def written_out(weight: Matrix, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """The definition: y[o] = sum over d of weight[o, d] x[d]."""
    return einsum(weight if isinstance(weight, Tensor) else dequantized(weight, x.dtype), x, "o d, ... d -> ... o")


@typed
def product(weight: Matrix, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out`, by torch's own matrix product."""
    rows = x.reshape(-1, x.shape[-1])  # compiled, rows that lie apart would each be multiplied by themselves
    if isinstance(weight, Quantized):  # 8 bits are exact in bfloat16
        exact = torch.promote_types(x.dtype, torch.float32)
        y = (F.linear(rows, weight.values.to(x.dtype)).to(exact) * weight.scale).to(x.dtype)
    else:
        y = F.linear(rows, dequantized(weight, x.dtype) if isinstance(weight, Grouped) else weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@typed
def sum_of_products(weight: Matrix, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
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
def by_triton(weight: Matrix, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows on a GPU, by a kernel of `gpu_row` or `gpu_sums`, which reads a weight once."""
    return _by_triton([weight], x)[0]


def _by_triton(weights: Sequence[Tensor | Quantized], x: Tensor) -> list[Tensor]:
    from llama_fn.ops.gpu import linear_few_rows as gpu_sums
    from llama_fn.ops.gpu import linear_one_row as gpu_row  # noqa: F401  they import triton, which is only where there is a GPU

    weights = [_matrix(weight, 1) for weight in weights]
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


def _for_triton(weight: Tensor | Kind, x: Tensor) -> bool:
    """Whether `by_triton` takes these: in a compiled step, whose arguments the weights are, 16 bits times 16 bits or
    times bytes, of as few rows as it is faster for than torch.
    """
    if not x.is_cuda or not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        return False
    values = weight.values if isinstance(weight, Quantized) else weight
    scaled = not isinstance(weight, Quantized) or weight.scale.is_contiguous()
    return (isinstance(values, Tensor) and values.is_contiguous() and scaled and values.dtype in (x.dtype, torch.int8)
            and x.dtype in (torch.bfloat16, torch.float16) and 0 < x.shape[:-1].numel() <= most_by_triton(weight)
            and not transforms() and not x.requires_grad)


def most_by_triton(weight: Tensor | Kind) -> int:
    """The rows for which these kernels are the fastest."""
    return 64 if isinstance(weight, Quantized) else 16


@typed
def by_cpp(weight: Matrix, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows on the CPU, by a kernel in C++ (see `avx2`)."""
    return _by_cpp([weight], x)[0]


def _by_cpp(weights: Sequence[Matrix], x: Tensor) -> list[Tensor]:
    ys = avx2.sums(weights, x.reshape(-1, x.shape[-1]))
    return [y.to(x.dtype).reshape(*x.shape[:-1], -1) for y in ys]


def _for_cpp(weight: Tensor | Kind, x: Tensor) -> bool:
    """Whether `by_cpp` takes these: in a compiled step, since a compiler makes it."""
    return (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
            and not torch.compiler.is_exporting() and avx2.takes(weight, x) and not transforms()
            and not x.requires_grad)


@typed
def in_pieces(weight: Matrix, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
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
