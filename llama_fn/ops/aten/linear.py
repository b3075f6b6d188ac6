"""The linear map by torch's own kernels."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama_fn import tree
from llama_fn.ops.aten.few_rows import FEW, Flat, in_memory
from llama_fn.ops.quantized import Grouped, Quantized, dequantized
from llama_fn.ops.weight import values_alone
from llama_fn.private import multiplies_bfloat16, times_bytes
from llama_fn.shapes import typed

PIECE = 1024  # outputs whose weights are cast to float32 at a time: some megabytes, which stay in the processor's cache
HAS_BFLOAT16 = multiplies_bfloat16()


@typed
def product(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out`, by torch's own matrix product."""
    rows = x.reshape(-1, x.shape[-1])  # inductor would compute a product for each leading axis
    if isinstance(weight, Quantized):  # 8 bits are exact in bfloat16
        exact = torch.promote_types(x.dtype, torch.float32)
        y = (F.linear(rows, weight.values.to(x.dtype)).to(exact) * weight.scale).to(x.dtype)
    else:
        y = F.linear(rows, dequantized(weight, x.dtype) if isinstance(weight, Grouped) else weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def accepts_product(matrix: Flat, x: Tensor) -> bool:
    """Whether `product` computes these: all but a tensor of another dtype than x."""
    return not isinstance(matrix, Tensor) or matrix.dtype == x.dtype


@typed
def sum_of_products(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for one row on a GPU, as a product and a sum.

    Inductor makes one loop of it, and one loop of several weights that meet the same row.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    row = in_memory(x).reshape(-1).to(exact)
    if isinstance(weight, Quantized):
        y = (weight.values.to(exact) * row).sum(-1) * weight.scale
    else:
        y = ((dequantized(weight, exact) if isinstance(weight, Grouped) else weight.to(exact)) * row).sum(-1)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def accepts_one_row(matrix: Flat, x: Tensor) -> bool:
    """Whether `sum_of_products` computes these: one row on a GPU."""
    return x.device.type != "cpu" and x.shape[:-1].numel() == 1 and values_alone(x)


@typed
def in_pieces(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` in float32, with the weight cast piece by piece.

    For 512 rows of bfloat16 on a processor without bfloat16 products: 160 GFLOP/s, where torch's product reaches 21
    (two cores, AVX2).
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    columns, parts = x.reshape(-1, x.shape[-1]).to(exact).mT, []  # W x^T: a tenth faster than x W^T
    for at in range(0, weight.shape[0], PIECE):
        piece = tree.map(lambda leaf, at=at: leaf[at:at + PIECE], weight)
        parts.append((piece.to(exact) if isinstance(piece, Tensor) else dequantized(piece, exact)) @ columns)
    return torch.cat(parts).mT.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def accepts_in_pieces(matrix: Flat, x: Tensor) -> bool:
    """Whether `in_pieces` is faster: on the CPU, for 4 bits and where bfloat16 products are slow."""
    slow = x.dtype == torch.bfloat16 and not HAS_BFLOAT16 and x.shape[:-1].numel() > FEW
    return (slow or isinstance(matrix, Grouped)) and x.device.type == "cpu" and values_alone(x)


@typed
def packed(weight: Quantized, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` of an 8-bit weight and bfloat16 rows, by torch's kernel that casts no whole weight to bfloat16."""
    rows, scale = in_memory(x.reshape(-1, x.shape[-1])), in_memory(weight.scale.to(x.dtype))
    rows = times_bytes(rows, weight.values, scale)
    return rows.reshape(*x.shape[:-1], -1)


def accepts_packed(matrix: Flat, x: Tensor) -> bool:
    """For a width that is no multiple of 16, torch's kernel reads past the end and is wrong (torch 2.13)."""
    return (isinstance(matrix, Quantized) and x.device.type == "cpu" and x.dtype == torch.bfloat16
            and matrix.values.is_contiguous() and 1 < x.shape[:-1].numel() <= 64 and x.shape[-1] % 16 == 0
            and values_alone(x))
