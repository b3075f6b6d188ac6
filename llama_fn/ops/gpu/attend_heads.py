"""Attention of many heads, each with keys of its own, on a GPU: a program a head, from the sums of its query, key and
value to what it says. The slots before its own are older than the step: the first of them come while the product before
ends.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.ops.gpu import launch as gpu
from llama_fn.ops.gpu.linear_few_rows import Weights, summed, sums_of
from llama_fn.ops.gpu.linear_one_row import Turned

MANY = 264  # heads of all rows, two on each of a Hopper's processors; of fewer, slots are shared among programs, too
SLOTS, WARPS = 32, 2  # that a program attends to at once: the fastest of five (H100)


def attended(weights: Weights, x: Tensor, places: Turned, seen: int) -> Tensor:
    """Heads "b k h" of rows "b d", over the first `seen` slots up to each row's own. Keys, turned, and values are
    written to their `places`.
    """
    (rows, _), (_, k, slots, h), ahead = x.shape, places.keys.shape, gpu.early(x)
    heads, (parts, told) = x.new_empty((rows, k, h)), sums_of(weights, x)
    _head[rows * k,](*told, heads, *places, rows, k, slots, seen, h, h ** -0.5, len(parts), triton.next_power_of_2(h),
                     SLOTS, bool(weights.scales), ahead, num_warps=WARPS, **gpu.launch(ahead))
    return heads


@triton.jit
def _head(parts, s0, s1, s2, o0, o1, o2, heads, cos, sin, keys, values, positions, rows, k, slots, seen,
          h: tl.constexpr, factor: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
          SCALED: tl.constexpr, EARLY: tl.constexpr):
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
    if EARLY:
        gdc_wait()  # for the sums
        gdc_launch_dependents()
    o = n % k * h + width
    query = _turned(parts, s0, s1, s2, o0, o1, o2, row, rows, o, inside, cos, sin, h, dtype, P, SCALED, WIDTH)
    own_key = _turned(parts, s0, s1, s2, o0, o1, o2, row, rows, o0 + o, inside, cos, sin, h, dtype, P, SCALED, WIDTH)
    own_value = summed(parts, s0, s1, s2, o0, o1, o2, row, rows, o0 + o1 + o, inside, dtype, P, SCALED)
    tl.store(keys + position * h + width, own_key.to(dtype), mask=inside & (position < slots))
    tl.store(values + position * h + width, own_value.to(dtype), mask=inside & (position < slots))
    query *= factor
    score = tl.sum(query * own_key, 0)  # of its own slot
    total = tl.where(position < seen, tl.exp(score - score), 0.0)  # 1, or none
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
def _turned(parts, s0, s1, s2, o0, o1, o2, row, rows, o, inside, cos, sin, h: tl.constexpr, dtype: tl.constexpr,
            P: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr):
    """Outputs of a head, turned."""
    out, pair = summed(parts, s0, s1, s2, o0, o1, o2, row, rows, o, inside, dtype, P, SCALED), tl.arange(0, WIDTH // 2)
    even, odd = tl.split(tl.reshape(out, [WIDTH // 2, 2]))
    cosine = tl.load(cos + row * (h // 2) + pair, mask=pair < h // 2, other=1)
    sine = tl.load(sin + row * (h // 2) + pair, mask=pair < h // 2, other=0)
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [WIDTH])
    return turned.to(dtype).to(tl.float32)
