"""Attention of many heads on a GPU, where each query head has its own keys: one program a head.

A program adds up the split-K parts of its query, key and value, rotates them, writes to the cache, and attends. The
slots before its own were written by earlier steps, so it loads the first of them while the previous kernel still runs.
"""

# The checker takes a Triton kernel's body and its launch `kernel[grid](...)` for plain Python.
# pyright: reportCallIssue=false

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.ops.gpu import launch as gpu
from llama_fn.ops.gpu.linear_few_rows import Weights, reduce_split_k, split_k_arguments
from llama_fn.ops.gpu.linear_one_row import Rotated

# Heads over all rows: two for each multiprocessor of an H100. For fewer heads, `flash_decoding.py` splits the slots.
MANY_HEADS = 264
SLOTS, WARPS = 32, 2  # of a program: the fastest of five pairs (H100)


def attended(weights: Weights, x: Tensor, rotation: Rotated, limit: int) -> Tensor:
    """Attention of rows "b d" with the projections `weights`: heads "b k h".

    Only the first `limit` slots, and of those the ones up to each row's position, are attended to. The rotated keys and
    the values are written to `rotation`.
    """
    (rows, _), (_, k, slots, h), pdl = x.shape, rotation.keys.shape, gpu.has_pdl(x)
    heads, (parts, arguments) = x.new_empty((rows, k, h)), split_k_arguments(weights, x)
    _head[rows * k,](*arguments, heads, *rotation, rows, k, slots, limit, h, h ** -0.5, len(parts),
                     triton.next_power_of_2(h), SLOTS, bool(weights.scales), pdl, num_warps=WARPS, **gpu.launch(pdl))
    return heads


@triton.jit
def _head(parts, s0, s1, s2, o0, o1, o2, heads, cos, sin, keys, values, positions, rows, k, slots, limit,
          h: tl.constexpr, scale: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
          SCALED: tl.constexpr, PDL: tl.constexpr):
    n, slot, width = tl.program_id(0), tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    row, inside = n // k, width < h
    dtype: tl.constexpr = heads.dtype.element_ty
    keys += n.to(tl.int64) * slots * h
    values += n.to(tl.int64) * slots * h
    position = tl.load(positions + row)
    past = tl.minimum(position, limit).to(tl.int32)
    at, mask = slot[:, None] * h + width[None, :], (slot < past)[:, None] & inside[None, :]
    key = tl.load(keys + at, mask=mask, other=0, eviction_policy="evict_first")
    value = tl.load(values + at, mask=mask, other=0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()  # for the split-K parts
        gdc_launch_dependents()
    o = n % k * h + width
    query = _rotated_head(parts, s0, s1, s2, o0, o1, o2, row, rows, o, inside, cos, sin, h, dtype, P, SCALED, WIDTH)
    own_key = _rotated_head(parts, s0, s1, s2, o0, o1, o2, row, rows, o0 + o, inside, cos, sin, h, dtype, P, SCALED,
                            WIDTH)
    own_value = reduce_split_k(parts, s0, s1, s2, o0, o1, o2, row, rows, o0 + o1 + o, inside, dtype, P, SCALED)
    tl.store(keys + position * h + width, own_key.to(dtype), mask=inside & (position < slots))
    tl.store(values + position * h + width, own_value.to(dtype), mask=inside & (position < slots))
    query *= scale
    score = tl.sum(query * own_key, 0)  # of the token's own slot
    total = tl.where(position < limit, tl.exp(score - score), 0.0)  # 1, or 0 if its own slot is not visible
    max_score = tl.where(position < limit, score, -float("inf"))
    out = own_value * total
    start = 0
    while start < past:  # softmax block by block (Milakov and Gimelshein 2018)
        scores = tl.where(start + slot < past, tl.sum(key.to(tl.float32) * query[None, :], 1), -float("inf"))
        new_max = tl.maximum(max_score, tl.max(scores, 0))
        weights, rescale = tl.exp(scores - new_max), tl.exp(max_score - new_max)
        total = total * rescale + tl.sum(weights, 0)
        out = out * rescale + tl.sum(value.to(tl.float32) * weights[:, None], 0)
        max_score = new_max
        start += SLOTS
        keys += SLOTS * h
        values += SLOTS * h
        mask = (start + slot < past)[:, None] & inside[None, :]
        key = tl.load(keys + at, mask=mask, other=0, eviction_policy="evict_first")
        value = tl.load(values + at, mask=mask, other=0, eviction_policy="evict_first")
    tl.store(heads + n.to(tl.int64) * h + width, (out / total).to(dtype), mask=inside)


@triton.jit
def _rotated_head(parts, s0, s1, s2, o0, o1, o2, row, rows, o, inside, cos, sin, h: tl.constexpr, dtype: tl.constexpr,
            P: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr):
    """The outputs `o` of one head, rotated by the position's angles."""
    out = reduce_split_k(parts, s0, s1, s2, o0, o1, o2, row, rows, o, inside, dtype, P, SCALED)
    pair = tl.arange(0, WIDTH // 2)
    even, odd = tl.split(tl.reshape(out, [WIDTH // 2, 2]))
    cosine = tl.load(cos + row * (h // 2) + pair, mask=pair < h // 2, other=1)
    sine = tl.load(sin + row * (h // 2) + pair, mask=pair < h // 2, other=0)
    rotated = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [WIDTH])
    return rotated.to(dtype).to(tl.float32)
