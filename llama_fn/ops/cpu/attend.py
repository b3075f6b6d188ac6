"""Attention on the CPU, by the C++ kernels of `attend_one_query.cpp` and `attend_many_queries.cpp`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.ops.cpu import build
from llama_fn.ops.operators import define
from llama_fn.shapes import typed


@typed
def by_cpp(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"], values: Float[Tensor, "*b k s h"],
           positions: Int[Tensor, "*b t"]) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for one query a row (t = 1), by a kernel in C++."""
    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    heads = queries.reshape(-1, *queries.shape[-4:-2], queries.shape[-1]).float()
    return one_query(heads, keys, values, positions.reshape(-1)).to(queries.dtype).reshape(queries.shape)


@typed
def many_by_cpp(queries: Float[Tensor, "*b k g t h"], keys: Float[Tensor, "*b k s h"],
                values: Float[Tensor, "*b k s h"],
                positions: Int[Tensor, "*b t"] | None) -> Float[Tensor, "*b k g t h"]:
    """`written_out` for any number of queries, by a kernel in C++.

    It holds no "t s" matrix of scores and skips masked slots.
    """
    *batch, k, g, t, h = queries.shape
    if positions is None:
        positions = torch.arange(t, device=queries.device).expand(*batch, t)
    keys, values = (leaf.reshape(-1, *leaf.shape[-3:]) for leaf in (keys, values))
    heads = many_queries(queries.reshape(-1, k, g, t, h), keys, values, positions.reshape(-1, t))
    return heads.reshape(queries.shape)


def supports(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `one_query` and `many_queries` compute this."""
    return (queries.device.type == "cpu" and build.vector_instructions() != "" and queries.numel() > 0
            and keys.dtype == values.dtype in build.DTYPES and keys.shape[-1] % 8 == 0)


def one_query(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of float32 queries "b k g h" over keys and values "b k s h": heads "b k g h".

    Row b attends to the slots up to `positions` "b". Slots after a row's position are not read.
    """
    build.load_for(queries, build.DECODE)
    keys, values = (leaf if leaf.stride(-1) == 1 else leaf.contiguous() for leaf in (keys, values))
    divided = (queries * queries.shape[-1] ** -0.5).contiguous()
    return torch.ops.llama_fn.attend_one_query(divided, keys, values, positions.long().contiguous(),
                                               torch.get_num_threads())


def many_queries(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of queries "b k g t h" over keys and values "b k s h": heads "b k g t h".

    A query attends to the slots up to its `positions` "b t". The result has the queries' dtype and lies in
    memory as "b t k g h". Slots after a row's largest position are not read.
    """
    build.load_for(queries, build.PREFILL)
    alike = (x.to(queries.dtype) for x in (queries, keys, values))
    queries, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in alike)
    heads = torch.ops.llama_fn.attend_many_queries(queries, keys, values, positions.long().contiguous(),
                                                   torch.get_num_threads())
    return heads.permute(0, 2, 3, 1, 4)


def _empty_one(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, threads: int) -> Tensor:
    return queries.new_empty(queries.shape)


def _empty_many(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, threads: int) -> Tensor:
    b, k, g, t, h = queries.shape
    return queries.new_empty((b, t, k, g, h))


ARGUMENTS = "(Tensor queries, Tensor keys, Tensor values, Tensor positions, int threads) -> Tensor"
define("attend_one_query" + ARGUMENTS, _empty_one)
define("attend_many_queries" + ARGUMENTS, _empty_many)
