"""The linear map: the written-out definition, and the kernels that compute it, for every kind of weight.

A weight is a tensor, or a `NamedTuple` that stands in a tensor's place in the tree and says what is to be computed
instead of W x. The rest of the model does not notice.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llama_fn import tree
from llama_fn.model.quantized import GROUP, Grouped, Quantized, dequantized
from llama_fn.model.tapped import Tapped, linear_observed
from llama_fn.shapes import transforms, typed


class Adapted(NamedTuple):
    """W + B A, where B and A are thin: x goes through W and, beside it, through A, then B (Hu et al. 2021, eq. 3)."""

    weight: Any  # a weight of any kind
    a: Float[Tensor, "_ ..."] | Tapped
    b: Float[Tensor, "... _"] | Tapped

    @property
    def shape(self) -> tuple[int, ...]:
        """That of W."""
        return self.weight.shape


Kind = Adapted | Tapped | Quantized | Grouped  # of a weight that is no tensor
Matrix = Float[Tensor, "o d"] | Quantized | Grouped

FEW = 8  # rows that a processor holds the sums of in its registers, while it reads a weight once
PIECE = 1024  # outputs of a weight that are made float32 at a time: some megabytes, which stay in the cache
HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@typed
def linear(weight: Float[Tensor, "..."] | Kind, x: Float[Tensor, "..."], inputs: int = 1) -> Float[Tensor, "..."]:
    """`written_out`, where the last `inputs` axes of the weight and of x together are d, and the weight's others o."""
    if isinstance(weight, Adapted):
        return linear(weight.weight, x, inputs) + linear(weight.b, linear(weight.a, x, inputs))
    if isinstance(weight, Tapped):
        plain, tap = weight.use()
        return linear_observed(linear(plain, x, inputs), x.flatten(-inputs), tap, len(plain.shape) - inputs)
    outer = weight.shape[:-inputs]
    matrix = weight.reshape(math.prod(outer), -1) if isinstance(weight, Tensor) else weight.flat()
    x = x.flatten(-inputs)
    return _kernel(matrix, x)(matrix, x).unflatten(-1, outer)


def _kernel(matrix: Matrix, x: Tensor) -> Callable[[Matrix, Tensor], Tensor]:
    """Torch's product, but on the CPU for rows of which nothing is mapped or differentiated: there, sums in a compiled
    step of few rows; and where torch has no good product, one of float32 pieces.

    Under a transform an axis may be hidden, and few rows be many.
    """
    rows, d = x.shape[:-1].numel(), x.shape[-1]
    if x.device.type != "cpu" or transforms() or x.requires_grad:
        return product
    if torch.compiler.is_compiling() and rows <= FEW and _whole_words(matrix):
        return sums
    if isinstance(matrix, Quantized) and x.dtype == torch.bfloat16 and 1 < rows <= 64 and d % 16 == 0:
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
    if isinstance(weight, Quantized):  # 8 bits are exact in bfloat16
        exact = torch.promote_types(x.dtype, torch.float32)
        return (F.linear(x, weight.values.to(x.dtype)).to(exact) * weight.scale).to(x.dtype)
    return F.linear(x, dequantized(weight, x.dtype) if isinstance(weight, Grouped) else weight)


@typed
def in_pieces(weight: Matrix, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` in float32, a piece of the weight after the other: for 512 rows of bfloat16 160 GFLOP/s where a
    processor without such products reaches 21 (two cores, AVX2)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    columns, parts = x.reshape(-1, x.shape[-1]).to(exact).mT, []  # W x^T: a tenth faster than x W^T
    for at in range(0, weight.shape[0], PIECE):
        piece = tree.map(lambda leaf, at=at: leaf[at:at + PIECE], weight)
        parts.append((piece.to(exact) if isinstance(piece, Tensor) else dequantized(piece, exact)) @ columns)
    return torch.cat(parts).mT.to(x.dtype).reshape(*x.shape[:-1], -1)


@typed
def packed(weight: Quantized, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` of an 8-bit weight and bfloat16 rows by torch's kernel, which makes no bfloat16 matrix of it."""
    rows = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight.values, weight.scale.to(x.dtype))
    return rows.reshape(*x.shape[:-1], -1)


# --- few rows at the speed of memory, in the words that inductor makes loops of


@typed
def sums(weight: Matrix, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows, as products summed in float32 at least: a weight is read once, and for one row its
    outputs in four streams side by side, so that four pages are on their way at once (28 GB/s where oneDNN's kernel
    reaches 20, two cores, bfloat16).
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, x.shape[-1]).to(exact)
    if isinstance(weight, Tensor):
        y = _sums(weight, rows)
    else:
        y = (_byte_sums if isinstance(weight, Quantized) else _nibble_sums)(weight, rows)
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def _sums(weight: Tensor, rows: Tensor) -> Tensor:
    rows, total = in_memory(rows), 0.0
    blocks = -(-rows.numel() // 24_576)  # rows that are not in the nearest caches are slower than a weight to read
    for part, some in zip(weight.chunk(blocks, -1), rows.chunk(blocks, -1), strict=True):
        width = part.shape[-1]  # in two halves, 24 GB/s in place of 21 for 5,632 inputs
        halves = 2 if len(rows) == 1 and width > 4096 and width % 2 == 0 else 1
        streams = [w.chunk(halves, -1) for w in part.chunk(_streams(part, rows))]
        total = total + _rows([[_dot(w, row.chunk(halves)) for w in streams] for row in some])
    return total


def _streams(weight: Matrix, rows: Tensor) -> int:
    """Into how many parts the outputs of a weight go, of which one loop reads each at once."""
    return max(1, 4 // len(rows)) if weight.shape[0] >= 1024 else 1


def _rows(streams: Sequence[Sequence[Tensor]]) -> Tensor:
    """The outputs of each row, stream after stream. Flat, inductor has the sums written where they belong; of a stack
    it would copy them."""
    return torch.cat([y for row in streams for y in row]).view(len(streams), -1)


def _dot(parts: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """The sum over the last axis, and over the parts, of part times factor: one loop over all parts side by side."""
    return sum(part.to(x.dtype) * x for part, x in zip(parts, factors, strict=True)).sum(-1)


def _byte_sums(weight: Quantized, rows: Tensor) -> Tensor:
    """Four integers lie in a word, that of input 4 j + i in byte i of word j. The highest is a shift away. To each of
    the others 128 is added, so that it can be masked out without its sign; where it lies it counts 256**i times, which
    the inputs make good, and the 128 count once for all. (Words are loaded as float32: inductor loads integers with a
    detour, six times slower.)
    """
    place = torch.tensor([1.0, 2.0**-8, 2.0**-16, 1.0], dtype=rows.dtype)
    ways = in_memory((rows.unflatten(-1, (-1, 4)) * place).mT)  # "b i j"
    added = 128 * in_memory(rows.unflatten(-1, (-1, 4))[..., :3].sum((-2, -1)))  # "b"
    streams = []
    for words in weight.values.view(torch.float32).chunk(_streams(weight, rows)):
        bits = words.view(torch.int32)
        shifted = bits ^ 0x00808080
        streams.append([(shifted & 255 << 8 * i if i < 3 else bits >> 24).to(rows.dtype) for i in range(4)])
    return (_rows([[_dot(numbers, row) for numbers in streams] for row in ways]) - added[:, None]) * weight.scale


def _nibble_sums(weight: Grouped, rows: Tensor) -> Tensor:
    """Eight integers lie in a word, that of input 8 j + i in nibble i of word j. Where it lies it counts 16**i times,
    which the inputs make good. A group's minimum counts once for all of its inputs.
    """
    place = torch.tensor([16.0 ** -i for i in range(7)] + [1.0], dtype=rows.dtype)
    ways = in_memory((rows.unflatten(-1, (-1, 8)) * place).mT).unflatten(-1, (-1, GROUP // 8))  # "b i groups j"
    whole = in_memory(rows.unflatten(-1, (-1, GROUP)).sum(-1))  # "b groups"
    streams = []
    for words, pair in zip(weight.values.view(torch.float32).chunk(max(1, 2 // len(rows))),
                           weight.scale.flatten(1).view(torch.float32).chunk(max(1, 2 // len(rows))), strict=True):
        bits = words.view(torch.int32).unflatten(-1, (-1, GROUP // 8))
        numbers = [(bits & 15 << 4 * i if i < 7 else bits >> 28 & 15).to(rows.dtype) for i in range(8)]
        two = pair.view(torch.int32)  # a bfloat16 is the upper half of a float32
        scale, minimum = ((two << 16).view(torch.float32), (two & -65536).view(torch.float32))
        streams.append(torch.stack([
            (sum(n * part for n, part in zip(numbers, row, strict=True)) * scale[..., None]).flatten(1).sum(-1)
            + (minimum * total).sum(-1) for row, total in zip(ways, whole, strict=True)]))
    return torch.cat(streams, -1)


def _whole_words(matrix: Matrix) -> bool:
    """Whether a row of the weight is whole words, and in four bits whole groups."""
    if isinstance(matrix, Tensor):
        return True
    return matrix.values.is_contiguous() and matrix.shape[-1] % (4 if isinstance(matrix, Quantized) else GROUP) == 0


def in_memory(x: Tensor) -> Tensor:
    """With strides of its own, x has to lie in memory: inductor would else compute it, and the norm before it, again
    for each output."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())
