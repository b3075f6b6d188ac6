"""The linear map by torch's own kernels."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama_fn import tree
from llama_fn.ops.aten.inductor_sums import FEW, Flat, in_memory
from llama_fn.ops.quantized import Grouped, Quantized, dequantized
from llama_fn.ops.weight import values_alone
from llama_fn.private import multiplies_bfloat16, times_bytes
from llama_fn.shapes import typed

PIECE = 1024  # outputs of a weight that are made float32 at a time: some megabytes, which stay in the cache
HAS_BFLOAT16 = multiplies_bfloat16()


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


def accepts_product(matrix: Flat, x: Tensor) -> bool:
    return not isinstance(matrix, Tensor) or matrix.dtype == x.dtype


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


def accepts_one_row(matrix: Flat, x: Tensor) -> bool:
    return x.device.type != "cpu" and x.shape[:-1].numel() == 1 and values_alone(x)


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


def accepts_in_pieces(matrix: Flat, x: Tensor) -> bool:
    slow = x.dtype == torch.bfloat16 and not HAS_BFLOAT16 and x.shape[:-1].numel() > FEW
    return (slow or isinstance(matrix, Grouped)) and x.device.type == "cpu" and values_alone(x)


@typed
def packed(weight: Quantized, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` of an 8-bit weight and bfloat16 rows by torch's kernel, which makes no bfloat16 matrix of it."""
    rows, scale = in_memory(x.reshape(-1, x.shape[-1])), in_memory(weight.scale.to(x.dtype))  # inductor has them there
    rows = times_bytes(rows, weight.values, scale)
    return rows.reshape(*x.shape[:-1], -1)


def accepts_packed(matrix: Flat, x: Tensor) -> bool:
    """Of widths that 16 does not divide, torch's kernel reads beyond the end and is wrong (torch 2.13)."""
    return (isinstance(matrix, Quantized) and x.device.type == "cpu" and x.dtype == torch.bfloat16
            and matrix.values.is_contiguous() and 1 < x.shape[:-1].numel() <= 64 and x.shape[-1] % 16 == 0
            and values_alone(x))
