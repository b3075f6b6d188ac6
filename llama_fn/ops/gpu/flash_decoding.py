"""Attention of one query a row on a GPU: several programs split a row's slots (flash decoding: Dao et al. 2023)."""

# The checker takes a Triton kernel's body and its launch `kernel[grid](...)` for plain Python.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fn.ops.gpu import launch as gpu
from llama_fn.ops.operators import define

MANY_SLOTS = 2**17  # above so many slots over all heads, a program attends to 128 slots and not to 32


def flash_decoding(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of queries "b k g h" over keys and values "b k s h", up to the slots `positions` "b": heads "b k g h".

    Slots after a row's position are not read. Each program attends to one block of slots. A second kernel takes the
    mean of the blocks' results, weighted by their sums of exp(scores) (flash decoding: Dao et al. 2023).
    """
    b, k, g, h = queries.shape
    queries, positions = queries.contiguous(), positions.contiguous()
    keys, values = (leaf if leaf.stride(-1) == 1 else leaf.contiguous() for leaf in (keys, values))
    many = g > 1 and b * k * keys.shape[2] > MANY_SLOTS  # every block of a group also writes g results
    block, pdl = 128 if many else 32, gpu.has_pdl(queries)
    blocks = triton.cdiv(keys.shape[2], block)
    parts = queries.new_empty((b * k * g, blocks, h), dtype=torch.float32)
    logsumexps = queries.new_empty((b * k * g, blocks), dtype=torch.float32)
    heads = empty_heads(queries, keys, values, positions)
    width, options = triton.next_power_of_2(h), gpu.launch(pdl)
    early = pdl and b * k * blocks <= 1024  # otherwise the next kernel's programs would start before this one's
    _block[b * k, blocks](queries, keys, values, positions, parts, logsumexps, keys.shape[2], *keys.stride()[:3],
                          *values.stride()[:3], k, g, h, width, block, h ** -0.5, pdl, early,
                          num_warps=4 if many else 2, **options)
    _combine[b * k * g,](parts, logsumexps, heads, blocks, h, width, 16, pdl, early, num_warps=2, **options)
    return heads


def empty_heads(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Memory for the result of `flash_decoding`."""
    return queries.new_empty(queries.shape)


@triton.jit
def _block(queries, keys, values, positions, parts, logsumexps, slots, k_row, k_head, k_slot, v_row, v_head, v_slot,
           k: tl.constexpr, g: tl.constexpr, h: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
           scale: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr):
    row, head = (tl.program_id(0) // k).to(tl.int64), (tl.program_id(0) % k).to(tl.int64)
    slot, width = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64), tl.arange(0, WIDTH)
    if PDL:
        gdc_wait()
    if EARLY:
        gdc_launch_dependents()
    visible = (slot <= tl.load(positions + row)) & (slot < slots)
    inside = visible[:, None] & (width < h)[None, :]
    keys += row * k_row + head * k_head
    values += row * v_row + head * v_head
    key = tl.load(keys + slot[:, None] * k_slot + width[None, :], mask=inside, other=0)
    value = tl.load(values + slot[:, None] * v_slot + width[None, :], mask=inside, other=0)
    for i in tl.static_range(g):
        n = tl.program_id(0) * g + i
        query = tl.load(queries + n * h + width, mask=width < h, other=0).to(tl.float32)
        scores = tl.where(visible, tl.sum(key.to(tl.float32) * query[None, :], 1) * scale, -float("inf"))
        max_score = tl.maximum(tl.max(scores, 0), -1e30)  # where no slot is visible
        weights = tl.exp(scores - max_score)
        total = tl.maximum(tl.sum(weights, 0), 1e-30)
        part = tl.sum(value.to(tl.float32) * weights[:, None], 0) / total
        place = n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(parts + place * h + width, part, mask=width < h)
        tl.store(logsumexps + place, max_score + tl.log(total))
    if PDL and not EARLY:
        gdc_launch_dependents()


@triton.jit
def _combine(parts, logsumexps, heads, blocks, h: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
          PDL: tl.constexpr, EARLY: tl.constexpr):
    n, width, block = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()  # who waits for this kernel waits for the one before it, too, for which this one does
    if PDL:
        gdc_wait()
    max_score = tl.load(logsumexps + n * blocks)  # the first slot is always visible
    total, out = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    start = 0
    while start < blocks:
        mask = start + block < blocks
        logsumexp = tl.load(logsumexps + n * blocks + start + block, mask=mask, other=-float("inf"))
        new_max = tl.maximum(max_score, tl.max(logsumexp, 0))
        weight, rescale = tl.exp(logsumexp - new_max), tl.exp(max_score - new_max)
        part = tl.load(parts + (n * blocks + start + block[:, None]) * h + width[None, :], other=0,
                       mask=mask[:, None] & (width < h)[None, :])
        total, out, max_score = total * rescale + weight, out * rescale + part * weight[:, None], new_max
        start += BLOCK
    if PDL and not EARLY:
        gdc_launch_dependents()
    tl.store(heads + n * h + width, tl.sum(out, 0) / tl.sum(total, 0), mask=width < h)


define("flash_decoding(Tensor queries, Tensor keys, Tensor values, Tensor positions) -> Tensor", empty_heads,
       CUDA=flash_decoding)
