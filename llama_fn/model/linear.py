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
    matrix, x = _matrix(weight, inputs), x.flatten(-inputs)
    return _kernel(matrix, x)(matrix, x).unflatten(-1, weight.shape[:-inputs])


def linears(weights: Sequence[Tensor | Kind], x: Float[Tensor, "..."]) -> list[Float[Tensor, "..."]]:
    """`linear` of each. A GPU reads them as one: a small weight is read before the GPU is at its speed."""
    if all(_for_triton(weight, x) for weight in weights) and len(set(map(type, weights))) == 1:
        matrices = [_matrix(weight, 1) for weight in weights]
        return [y.unflatten(-1, weight.shape[:-1]) for y, weight in zip(_together(matrices, x), weights, strict=True)]
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
    if x.device.type != "cpu":
        return sum_of_products if torch.compiler.is_compiling() and rows == 1 else product
    if torch.compiler.is_compiling() and 0 < rows <= FEW and (isinstance(matrix, Tensor) or _whole_words(matrix)):
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
    """`written_out` for a few rows on a GPU, by a kernel of `gpu`, which reads a weight once and as it is."""
    return _together([weight], x)[0]


def _together(weights: Sequence[Matrix], x: Tensor) -> list[Tensor]:
    from llama_fn.model import gpu  # it imports triton, which is only where there is a GPU

    values = [weight.values if isinstance(weight, Quantized) else weight for weight in weights]
    rows = gpu.ways(x.reshape(-1, x.shape[-1]), values[0].dtype)
    parts = torch.ops.llama_fn.sums(values, rows, gpu.share(values, rows))  # "p b o"
    ys = parts.sum(0).split([len(value) for value in values], -1)
    ys = [y * weight.scale if isinstance(weight, Quantized) else y for y, weight in zip(ys, weights, strict=True)]
    return [y.to(x.dtype).reshape(*x.shape[:-1], -1) for y in ys]


def _for_triton(weight: Tensor | Kind, x: Tensor) -> bool:
    """Whether `by_triton` takes these: in a compiled step, whose arguments the weights are, 16 bits times 16 bits or
    times bytes, of as few rows as it is faster for than torch.
    """
    if not x.is_cuda or not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        return False
    values, most = (weight.values, 64) if isinstance(weight, Quantized) else (weight, 16)
    return (isinstance(values, Tensor) and values.is_contiguous() and values.dtype in (x.dtype, torch.int8)
            and x.dtype in (torch.bfloat16, torch.float16) and 0 < x.shape[:-1].numel() <= most
            and not transforms() and not x.requires_grad)


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
    rows = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight.values, weight.scale.to(x.dtype))
    return rows.reshape(*x.shape[:-1], -1)


# --- few rows at the speed of memory, in the words that inductor makes loops of


@typed
def sums(weight: Matrix, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows, as products summed in float32 at least: a weight is read once, as words of 32 bits
    and in streams side by side, so that pages are on their way at once (34 GB/s where oneDNN's kernel reaches 20, two
    cores, bfloat16).
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    rows = in_memory(x.reshape(-1, x.shape[-1]).to(exact))
    if isinstance(weight, Quantized):
        y = _byte_sums(weight, rows)
    elif isinstance(weight, Grouped):
        y = _nibble_sums(weight, rows)
    elif weight.dtype == torch.bfloat16 and not torch.compiler.is_dynamo_compiling() and _whole_words(weight):
        y = _word_sums(weight.view(torch.float32), _halves, rows)
    else:
        y = _word_sums(weight, lambda words: [words], rows)
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def _word_sums(words: Tensor, numbers: Callable[[Tensor], list[Tensor]], rows: Tensor) -> Tensor:
    """The sum over all `numbers` of all words, of number times input; number i of word j is that of input n j + i."""
    ways = apart(rows.unflatten(-1, (words.shape[-1], -1)).mT)  # "b n j"
    parts = -(-words.shape[-1] // 4096)  # inductor sums more numbers with a detour, twice as slow
    parts = parts if words.shape[-1] % parts == 0 else 1
    streams = [[number.to(rows.dtype) for part in stream.chunk(parts, -1) for number in numbers(part)]
               for stream in words.chunk(_streams(words, rows))]
    factors = [[part[i] for part in row.chunk(parts, -1) for i in range(len(row))] for row in ways]
    return _rows([[sum(n * x for n, x in zip(stream, row, strict=True)).sum(-1) for stream in streams]
                  for row in factors])


def _streams(words: Tensor, rows: Tensor) -> int:
    """Into how many parts the outputs of a weight go, of which one loop reads each at once."""
    return 1 if len(words) < 1024 else 4 if len(rows) <= 2 else 2


def _rows(sums: Sequence[Sequence[Tensor]]) -> Tensor:
    """The outputs of each row, stream after stream. Flat, inductor has sums written where they belong; of a stack it
    would copy them."""
    return torch.cat([y for row in sums for y in row]).view(len(sums), -1)


def _halves(words: Tensor) -> list[Tensor]:
    """Two numbers of bfloat16 lie in a word, the first below. Each is the upper half of a float32. (Words are loaded as
    float32: inductor loads integers with a detour, six times slower.)
    """
    bits = words.view(torch.int32)
    return [(bits << 16).view(torch.float32), (bits & -65536).view(torch.float32)]


def _byte_sums(weight: Quantized, rows: Tensor) -> Tensor:
    """Four integers lie in a word, the first below. The highest is a shift away. To each of the others 128 is added, so
    that it can be masked out without its sign; where it lies it counts 256**i times, which the inputs make good, and
    the 128 count once for all.
    """
    def numbers(words: Tensor) -> list[Tensor]:
        bits = words.view(torch.int32)
        shifted = bits ^ 0x00808080
        return [shifted & 255 << 8 * i if i < 3 else bits >> 24 for i in range(4)]

    fours = rows.unflatten(-1, (-1, 4))
    place = torch.tensor([1.0, 2.0**-8, 2.0**-16, 1.0], dtype=rows.dtype)
    added = 128 * in_memory(fours[..., :3].sum((-2, -1)))  # "b"
    y = _word_sums(weight.values.view(torch.float32), numbers, (fours * place).flatten(1))
    return (y - added[:, None]) * weight.scale


def _nibble_sums(weight: Grouped, rows: Tensor) -> Tensor:
    """Eight integers lie in a word, that of input 8 j + i in nibble i of word j. Where it lies it counts 16**i times,
    which the inputs make good. A group's minimum counts once for all of its inputs.
    """
    place = torch.tensor([16.0 ** -i for i in range(7)] + [1.0], dtype=rows.dtype)
    ways = apart((rows.unflatten(-1, (-1, 8)) * place).mT).unflatten(-1, (-1, GROUP // 8))  # "b i groups j"
    whole = in_memory(rows.unflatten(-1, (-1, GROUP)).sum(-1))  # "b groups"
    streams = []
    for words, pair in zip(weight.values.view(torch.float32).chunk(max(1, 2 // len(rows))),
                           weight.scale.flatten(1).view(torch.float32).chunk(max(1, 2 // len(rows))), strict=True):
        bits = words.view(torch.int32).unflatten(-1, (-1, GROUP // 8))
        numbers = [(bits & 15 << 4 * i if i < 7 else bits >> 28 & 15).to(rows.dtype) for i in range(8)]
        streams.append((numbers, *_halves(pair)))

    def one(row: Tensor, total: Tensor, numbers: list[Tensor], scale: Tensor, minimum: Tensor) -> Tensor:
        products = [n * part for n, part in zip(numbers, row, strict=True)]
        group = sum(products[:4]) + sum(products[4:])  # of two chains, 6 % faster than of one
        return (group * scale[..., None]).flatten(1).sum(-1) + (minimum * total).sum(-1)

    return _rows([[one(row, total, *stream) for stream in streams] for row, total in zip(ways, whole, strict=True)])


def _whole_words(matrix: Matrix) -> bool:
    """Whether a row of the weight is whole words, and in four bits whole groups."""
    values = matrix if isinstance(matrix, Tensor) else matrix.values
    whole = GROUP // 2 if isinstance(matrix, Grouped) else 4 // values.itemsize
    return (values.is_contiguous() and values.shape[-1] % whole == 0
            and (torch.compiler.is_dynamo_compiling() or values.storage_offset() % whole == 0))  # unknown to dynamo


def in_memory(x: Tensor) -> Tensor:
    """With strides of its own, x has to lie in memory: inductor would else compute it, and the norm before it, again
    for each output."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def apart(x: Tensor) -> Tensor:
    """`in_memory`, its rows a cache line further apart: rows of a power of two would drive each other out of the cache
    (eight rows take 1.4 times as long)."""
    return in_memory(x if len(x) == 1 else F.pad(x, (0, 64 // x.itemsize)))[..., :x.shape[-1]]
