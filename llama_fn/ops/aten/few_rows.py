"""The linear map of a few rows on the CPU, at the memory's speed, in operations that inductor fuses into loops."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama_fn.modes import under_dynamo
from llama_fn.ops.quantized import GROUP, Grouped, Quantized, has_own_dtypes
from llama_fn.ops.weight import values_alone
from llama_fn.shapes import typed

Flat = Float[Tensor, "o d"] | Quantized | Grouped

FEW = 8  # rows whose accumulators fit in the registers, so that a weight is read once


@typed
def few_rows(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows, accumulated in float32 at least.

    Each weight is read once, as 32-bit words. Several streams of weights are read side by side, so that the processor
    prefetches several pages at once: 34 GB/s, where oneDNN's kernel reaches 20 (two cores, bfloat16).
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    rows = in_memory(x.reshape(-1, x.shape[-1]).to(exact))
    if isinstance(weight, Quantized):
        y = _int8_sums(weight, rows)
    elif isinstance(weight, Grouped):
        y = _int4_sums(weight, rows)
    elif weight.dtype == torch.bfloat16 and not under_dynamo() and whole_words(weight):
        y = _sums(weight.view(torch.float32), _halves, rows)
    else:
        y = _sums(weight, lambda words: [words], rows)
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def _sums(words: Tensor, numbers: Callable[[Tensor], list[Tensor]], rows: Tensor) -> Tensor:
    """W x, where `numbers` unpacks each word into n weights: weight i of word j is multiplied with input n j + i."""
    columns = with_padded_rows(rows.unflatten(-1, (words.shape[-1], -1)).mT)  # "b n j"
    parts = -(-words.shape[-1] // 4096)  # Inductor splits a longer sum into two loops, which takes twice as long.
    parts = parts if words.shape[-1] % parts == 0 else 1
    streams = [[number.to(rows.dtype) for part in stream.chunk(parts, -1) for number in numbers(part)]
               for stream in words.chunk(_streams(words, rows))]
    factors = [[part[i] for part in row.chunk(parts, -1) for i in range(len(row))] for row in columns]
    return _rows([[_products(stream, row).sum(-1) for stream in streams] for row in factors])


def _products(numbers: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """The sum of each number times its input."""
    return cast(Tensor, sum(n * x for n, x in zip(numbers, inputs, strict=True)))  # there is one product at least


def _streams(words: Tensor, rows: Tensor) -> int:
    """The number of streams: parts of a weight's outputs that one loop reads side by side."""
    return 1 if len(words) < 1024 else 4 if len(rows) <= 2 else 2


def _rows(sums: Sequence[Sequence[Tensor]]) -> Tensor:
    """The outputs of each row, stream after stream.

    Inductor writes the parts of a `cat` where they belong; those of a `stack` it would copy.
    """
    return torch.cat([y for row in sums for y in row]).view(len(sums), -1)


def _halves(words: Tensor) -> list[Tensor]:
    """The two bfloat16 numbers of each word, the lower half first, each as the upper half of a float32.

    Words are loaded as float32, since inductor's loops load integers six times slower.
    """
    bits = words.view(torch.int32)
    return [(bits << 16).view(torch.float32), (bits & -65536).view(torch.float32)]


def _int8_sums(weight: Quantized, rows: Tensor) -> Tensor:
    """`few_rows` of 8-bit weights, four of which lie in a word, the first in the lowest byte.

    The highest byte is shifted down with its sign. To each of the others 128 is added, so that it can be masked without
    its sign. Byte i stays in place and so counts 256**i times: its input is divided by that. The added 128 are
    subtracted once for all.
    """
    def numbers(words: Tensor) -> list[Tensor]:
        bits = words.view(torch.int32)
        shifted = bits ^ 0x00808080
        return [shifted & 255 << 8 * i if i < 3 else bits >> 24 for i in range(4)]

    fours = rows.unflatten(-1, (-1, 4))
    place = torch.tensor([1.0, 2.0**-8, 2.0**-16, 1.0], dtype=rows.dtype, device=rows.device)
    added = 128 * in_memory(fours[..., :3].sum((-2, -1)))  # "b"
    y = _sums(weight.values.view(torch.float32), numbers, (fours * place).flatten(1))
    return (y - added[:, None]) * weight.scale


def _int4_sums(weight: Grouped, rows: Tensor) -> Tensor:
    """`few_rows` of 4-bit weights, eight of which lie in a word: that of input 8 j + i in nibble i of word j.

    Nibble i stays in place and so counts 16**i times: its input is divided by that. A group's minimum is multiplied
    with the sum of its inputs.
    """
    place = torch.tensor([16.0 ** -i for i in range(7)] + [1.0], dtype=rows.dtype, device=rows.device)
    columns = with_padded_rows((rows.unflatten(-1, (-1, 8)) * place).mT)
    columns = columns.unflatten(-1, (-1, GROUP // 8))  # "b i groups j"
    whole = in_memory(rows.unflatten(-1, (-1, GROUP)).sum(-1))  # "b groups"
    streams = []
    for words, pair in zip(weight.values.view(torch.float32).chunk(max(1, 2 // len(rows))),
                           weight.scale.flatten(1).view(torch.float32).chunk(max(1, 2 // len(rows))), strict=True):
        bits = words.view(torch.int32).unflatten(-1, (-1, GROUP // 8))
        numbers = [(bits & 15 << 4 * i if i < 7 else bits >> 28 & 15).to(rows.dtype) for i in range(8)]
        streams.append((numbers, *_halves(pair)))

    def one(row: Tensor, total: Tensor, numbers: list[Tensor], scale: Tensor, minimum: Tensor) -> Tensor:
        products = [n * part for n, part in zip(numbers, row, strict=True)]
        group = sum(products[:4]) + sum(products[4:])  # two chains of additions are 6 % faster than one
        return (group * scale[..., None]).flatten(1).sum(-1) + (minimum * total).sum(-1)

    return _rows([[one(row, total, *stream) for stream in streams] for row, total in zip(columns, whole, strict=True)])


def whole_words(matrix: Flat) -> bool:
    """Whether a row of the weight consists of whole words, and of whole groups for 4 bits, in the quantized dtypes."""
    values = matrix if isinstance(matrix, Tensor) else matrix.values
    whole = GROUP // 2 if isinstance(matrix, Grouped) else 4 // values.itemsize
    return (values.is_contiguous() and values.shape[-1] % whole == 0
            and (isinstance(matrix, Tensor) or has_own_dtypes(matrix))
            and (under_dynamo() or values.storage_offset() % whole == 0))  # unknown to dynamo


def in_memory(x: Tensor) -> Tensor:
    """The tensor x, in memory with fixed strides.

    Inductor would otherwise compute x, and the norm before it, again for each output.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def with_padded_rows(x: Tensor) -> Tensor:
    """`in_memory`, with each row padded by one cache line.

    Rows whose size is a power of two would evict each other from the cache (eight rows take 1.4 times as long).
    """
    return in_memory(x if len(x) == 1 else F.pad(x, (0, 64 // x.itemsize)))[..., :x.shape[-1]]


def accepts_few_rows(matrix: Flat, x: Tensor) -> bool:
    """Whether `few_rows` computes these: a few rows on the CPU, of which no axis is hidden by a transform."""
    return (x.device.type == "cpu" and 0 < x.shape[:-1].numel() <= FEW
            and (isinstance(matrix, Tensor) or whole_words(matrix)) and values_alone(x))
