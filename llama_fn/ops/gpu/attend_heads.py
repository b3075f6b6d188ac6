"""Attention of many heads on a GPU, where each query head has its own keys: one program a head.

A program adds up the split-K parts of its query, key and value, rotates them, writes to the cache, and attends. The
slots before its own were written by earlier steps, so it loads the first of them while the kernel before still runs.
"""

# The checker takes a Triton kernel's body and its launch `kernel[grid](...)` for plain Python.
# pyright: reportCallIssue=false

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.ops.gpu import launch as gpu
from llama_fn.ops.gpu.linear_few_rows import Weights, summed, sums_of
from llama_fn.ops.gpu.linear_one_row import Rotated

MANY = 264  # heads over all rows: two for each multiprocessor (H100); for fewer, `attend.py` splits the slots
SLOTS, WARPS = 32, 2  # of a program: the fastest of five pairs (H100)


def attended(weights: Weights, x: Tensor, places: Rotated, seen: int) -> Tensor:
    """Attention of rows "b d" with the projections `weights`: heads "b k h".

    Only the first `seen` slots, and of those the ones up to each row's position, are attended to. The rotated keys and
    the values are written to `places`.
    """
    (rows, _), (_, k, slots, h), pdl = x.shape, places.keys.shape, gpu.has_pdl(x)
    heads, (parts, arguments) = x.new_empty((rows, k, h)), sums_of(weights, x)
    _head[rows * k,](*arguments, heads, *places, rows, k, slots, seen, h, h ** -0.5, len(parts),
                     triton.next_power_of_2(h), SLOTS, bool(weights.scales), pdl, num_warps=WARPS, **gpu.launch(pdl))
    return heads


@triton.jit
def _head(parts, s0, s1, s2, o0, o1, o2, heads, cos, sin, keys, values, positions, rows, k, slots, seen,
          h: tl.constexpr, factor: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
          SCALED: tl.constexpr, PDL: tl.constexpr):
    n, slot, width = tl.program_id(0), tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    row, inside = n // k, width < h
    dtype: tl.constexpr = heads.dtype.element_ty
    keys += n.to(tl.int64) * slots * h
    values += n.to(tl.int64) * slots * h
    position = tl.load(positions + row)
    older = tl.minimum(position, seen).to(tl.int32)
    at, there = slot[:, None] * h + width[None, :], (slot < older)[:, None] & inside[None, :]
    key = tl.load(keys + at, mask=there, other=0, eviction_policy="evict_first")
    value = tl.load(values + at, mask=there, other=0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()  # for the sums
        gdc_launch_dependents()
    o = n % k * h + width
    query = _rotated_head(parts, s0, s1, s2, o0, o1, o2, row, rows, o, inside, cos, sin, h, dtype, P, SCALED, WIDTH)
    own_key = _rotated_head(parts, s0, s1, s2, o0, o1, o2, row, rows, o0 + o, inside, cos, sin, h, dtype, P, SCALED,
                            WIDTH)
    own_value = summed(parts, s0, s1, s2, o0, o1, o2, row, rows, o0 + o1 + o, inside, dtype, P, SCALED)
    tl.store(keys + position * h + width, own_key.to(dtype), mask=inside & (position < slots))
    tl.store(values + position * h + width, own_value.to(dtype), mask=inside & (position < slots))
    query *= factor
    score = tl.sum(query * own_key, 0)  # of the token's own slot
    total = tl.where(position < seen, tl.exp(score - score), 0.0)  # 1, or 0 if its own slot is not seen
    most = tl.where(position < seen, score, -float("inf"))
    out = own_value * total
    start = 0
    while start < older:  # softmax block by block (Milakov and Gimelshein 2018)
        scores = tl.where(start + slot < older, tl.sum(key.to(tl.float32) * query[None, :], 1), -float("inf"))
        larger = tl.maximum(most, tl.max(scores, 0))
        weights, before = tl.exp(scores - larger), tl.exp(most - larger)
        total = total * before + tl.sum(weights, 0)
        out = out * before + tl.sum(value.to(tl.float32) * weights[:, None], 0)
        most = larger
        start += SLOTS
        keys += SLOTS * h
        values += SLOTS * h
        there = (start + slot < older)[:, None] & inside[None, :]
        key = tl.load(keys + at, mask=there, other=0, eviction_policy="evict_first")
        value = tl.load(values + at, mask=there, other=0, eviction_policy="evict_first")
    tl.store(heads + n.to(tl.int64) * h + width, (out / total).to(dtype), mask=inside)


@triton.jit
def _rotated_head(parts, s0, s1, s2, o0, o1, o2, row, rows, o, inside, cos, sin, h: tl.constexpr, dtype: tl.constexpr,
            P: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr):
    """The outputs `o` of one head, rotated by the position's angles."""
    out, pair = summed(parts, s0, s1, s2, o0, o1, o2, row, rows, o, inside, dtype, P, SCALED), tl.arange(0, WIDTH // 2)
    even, odd = tl.split(tl.reshape(out, [WIDTH // 2, 2]))
    cosine = tl.load(cos + row * (h // 2) + pair, mask=pair < h // 2, other=1)
    sine = tl.load(sin + row * (h // 2) + pair, mask=pair < h // 2, other=0)
    rotated = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [WIDTH])
    return rotated.to(dtype).to(tl.float32)
