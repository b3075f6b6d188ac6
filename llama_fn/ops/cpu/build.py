"""The kernels in C++: how they are compiled, what they compute, and the operators that call them.

They need a processor with AVX2 or AVX-512. There are linear maps of a few rows (`linear_floats.cpp`,
`linear_integers.cpp`), attention of one query a row (`attend_one_query.cpp`) and of many (`attend_many_queries.cpp`),
and all layers of one token at once (`step.cpp`, see `compiled/whole_step.py`).

Torch's own kernels for these do not reach the memory's speed (its 4-bit kernel reads 7 GB/s of 30). Inductor's loops
compute only with floats, read each weight once per row, reach a third of these kernels' speed in attention, and take
twice as long to trace.
"""

import functools
import math
import re
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from llama_fn.ops.operators import define
from llama_fn.ops.quantized import GROUP, Grouped, Quantized, as_made
from llama_fn.private import FakeTensor, load_cpp

FILES = {"floats": "linear_floats.cpp", "integers": "linear_integers.cpp", "one_query": "attend_one_query.cpp",
         "one_token": "step.cpp", "many_queries": "attend_many_queries.cpp"}  # the source of each operator
STEP, PROMPT = ("floats", "integers", "one_query", "one_token"), ("many_queries",)  # each is compiled as one library
KERNELS = (*STEP, *PROMPT)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def takes(weight: Any, x: Tensor) -> bool:
    """Whether `sums` computes this product. For quantized weights it rounds inputs, so they must be 16-bit."""
    rows, d = x.shape[:-1].numel(), x.shape[-1]
    if x.device.type != "cpu" or not 0 < rows <= most(weight) or d == 0 or not level():
        return False
    if isinstance(weight, Tensor):
        return weight.is_contiguous() and weight.dtype == x.dtype in FLOATS and d % 8 == 0
    return (isinstance(weight, Quantized | Grouped) and weight.values.is_contiguous() and as_made(weight)
            and x.dtype in (torch.bfloat16, torch.float16) and d % GROUP == 0)


def most(weight: Any) -> int:
    """The number of rows up to which these kernels are the fastest."""
    return 32 if isinstance(weight, Tensor) and level() else 8


def sums(weights: Sequence[Tensor | Quantized | Grouped], x: Tensor) -> list[Tensor]:
    """W x in float32 for weights "... d" of one kind and rows "r d": for each weight, its outputs "r o".

    For quantized weights, inputs are rounded. The error is at most 2^-16 of the largest input in a group of 64.
    """
    _loaded(x, STEP)
    values, scales = parts(weights)
    rest = x.float().contiguous(), torch.get_num_threads()
    if isinstance(weights[0], Quantized):  # a cast of the tree may have changed their dtype
        scales = [scale.float().contiguous() for scale in scales]
    rows = torch.ops.llama_fn.integers(values, scales, *rest) if scales else torch.ops.llama_fn.floats(values, *rest)
    return list(rows.split([math.prod(w.shape[:-1]) for w in weights], -1))


def parts(weights: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """A kernel's arguments for these weights: their numbers, and the scales of quantized ones (or an empty list)."""
    if all(isinstance(weight, Quantized | Grouped) for weight in weights):
        return [weight.values for weight in weights], [weight.scale for weight in weights]
    return list(weights), []


def _empty_floats(values: list[Tensor], x: Tensor, threads: int) -> Tensor:
    return x.new_empty((x.shape[0], sum(value.numel() // x.shape[-1] for value in values)))


def _empty_integers(values: list[Tensor], scales: list[Tensor], x: Tensor, threads: int) -> Tensor:
    numbers = sum(value.numel() * (2 if value.dtype == torch.uint8 else 1) for value in values)
    return x.new_empty((x.shape[0], numbers // x.shape[-1]))


def attends(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `one_query` and `many_queries` compute this."""
    return (queries.device.type == "cpu" and level() != "" and queries.numel() > 0
            and keys.dtype == values.dtype in FLOATS and keys.shape[-1] % 8 == 0)


def one_query(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of float32 queries "b k g h" over keys and values "b k s h": heads "b k g h".

    Row b attends to the slots up to `positions` "b". Slots after a row's position are not read.
    """
    _loaded(queries, STEP)
    keys, values = (leaf if leaf.stride(-1) == 1 else leaf.contiguous() for leaf in (keys, values))
    scaled = (queries * queries.shape[-1] ** -0.5).contiguous()
    return torch.ops.llama_fn.one_query(scaled, keys, values, positions.long().contiguous(),
                                         torch.get_num_threads())


def _empty_heads(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, threads: int) -> Tensor:
    return queries.new_empty(queries.shape)


def many_queries(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of queries "b k g t h" over keys and values "b k s h": heads "b k g t h".

    A query attends to the slots up to its `positions` "b t". The result has the queries' dtype and lies in
    memory as "b t k g h". Slots after a row's largest position are not read.
    """
    _loaded(queries, PROMPT)
    alike = (x.to(queries.dtype) for x in (queries, keys, values))
    queries, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in alike)
    heads = torch.ops.llama_fn.many_queries(queries, keys, values, positions.long().contiguous(),
                                            torch.get_num_threads())
    return heads.permute(0, 2, 3, 1, 4)


def _empty_many(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, threads: int) -> Tensor:
    b, k, g, t, h = queries.shape
    return queries.new_empty((b, t, k, g, h))


def level() -> str:
    """The processor's vector instructions, "AVX2" or "AVX512"; "" where these kernels cannot be compiled."""
    capability = torch.backends.cpu.get_cpu_capability() if sys.platform == "linux" else ""
    return capability if capability in ("AVX2", "AVX512") else ""


def ready(graph: Graph) -> None:
    """Wait until the kernels that a graph calls are compiled and loaded."""
    there = {node.target for node in graph.nodes}
    for kernels in (STEP, PROMPT):
        if any(getattr(torch.ops.llama_fn, kernel).default in there for kernel in kernels):
            load(kernels)


def load(kernels: tuple[str, ...] = STEP) -> None:
    """Compile and load these kernels, if they are not loaded yet."""
    try:
        _made()[kernels].result()
    except Exception:
        _made.cache_clear()  # so that the next call tries again: a full disk, say, may have room by then
        raise


def _loaded(x: Tensor, kernels: tuple[str, ...]) -> None:
    """`load` these kernels. While tracing, only start to compile them, since nothing runs yet."""
    _made() if isinstance(x, FakeTensor) else load(kernels)


@functools.cache
def _made() -> dict[tuple[str, ...], Future]:
    """The kernels, as futures: threads compile them, which takes six seconds, while a step is traced.

    They are compiled like inductor's loops, and kept on disk in the same folder for later processes.
    """
    compiler = ThreadPoolExecutor(2)
    flags = ("-mavx2", "-mfma", "-mf16c")
    return {kernels: compiler.submit(load_cpp, _source(kernels), flags) for kernels in (STEP, PROMPT)}


def _source(kernels: tuple[str, ...]) -> str:
    """The source files of these kernels and what they include, as one text.

    Its first line names the vector instructions, since different processors may share the folder of compiled kernels.
    """
    source, seen = f"// {level()}\n", set()

    def take(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = Path(__file__).with_name(name).read_text().replace("#pragma once\n", "")
        return re.sub(r'#include "(.*)"', lambda found: take(found[1]), text)

    return source + "".join(take(FILES[kernel]) for kernel in kernels)


# The CPU kernels of these operators are the C++ sources in `FILES`.
define("floats(Tensor[] values, Tensor x, int threads) -> Tensor", _empty_floats)
define("integers(Tensor[] values, Tensor[] scales, Tensor x, int threads) -> Tensor", _empty_integers)
define("one_token(Tensor tokens, Tensor embedding, Tensor frequencies, Tensor[] norms, Tensor[] values, "
       "Tensor[] scales, Tensor(a!)[] keys, Tensor(b!)[] cached, Tensor positions, float eps, int threads) -> Tensor",
       lambda tokens, embedding, *_: embedding.new_empty((*tokens.shape, embedding.shape[1])))
define("head(Tensor x, Tensor norm, Tensor[] values, Tensor[] scales, float eps, int threads) -> Tensor",
       lambda x, norm, values, *_: x.new_empty((*x.shape[:-1], values[0].shape[0])))
define("one_query(Tensor queries, Tensor keys, Tensor values, Tensor positions, int threads) -> Tensor", _empty_heads)
define("many_queries(Tensor queries, Tensor keys, Tensor values, Tensor positions, int threads) -> Tensor", _empty_many)
