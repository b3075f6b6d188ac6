"""Few rows times matrices of integers at the speed of memory, on a processor with AVX2, by `integers.cpp`.

Torch has no such kernel there (its own of four bits reads 7 GB/s of 30), and inductor's loops know floats alone.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph

from llama_fn.model.operators import define
from llama_fn.model.quantized import GROUP, Grouped, Quantized, as_made

ROWS = 8  # that it takes at most


def takes(weight: Any, x: Tensor) -> bool:
    """Whether `sums` computes this, but for what inputs lose, which must be few bits already."""
    return (isinstance(weight, Quantized | Grouped) and weight.values.is_contiguous() and as_made(weight)
            and x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu" and x.numel() > 0
            and x.shape[:-1].numel() <= ROWS and x.shape[-1] % GROUP == 0 and _here())


def sums(weights: Sequence[Quantized | Grouped], x: Tensor) -> list[Tensor]:
    """Of weights "... d" of one kind and rows "r d", in float32, the outputs "r o". An input is off by at most 2^-16 of
    the largest of its 64.
    """
    load = _compiled()
    if not isinstance(x, FakeTensor):
        load()
    scales = [w.scale for w in weights if isinstance(w, Grouped)]
    rows = torch.ops.llama_fn.integers([w.values for w in weights], scales, x.float().contiguous(),
                                       torch.get_num_threads())
    ys = rows.split([math.prod(w.shape[:-1]) for w in weights], -1)
    return [y * w.scale.flatten() if isinstance(w, Quantized) else y for y, w in zip(ys, weights, strict=True)]


def _empty(values: list[Tensor], scales: list[Tensor], x: Tensor, threads: int) -> Tensor:
    width = x.shape[-1] // 2 if scales else x.shape[-1]
    return x.new_empty((x.shape[0], sum(value.numel() // width for value in values)))


def _here() -> bool:
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def ready(graph: Graph) -> None:
    """Wait for the kernel, if a graph has it."""
    if graph.find_nodes(op="call_function", target=torch.ops.llama_fn.integers.default):
        _compiled()()


@functools.cache
def _compiled() -> Callable[[], object]:
    """What loads the kernel. It is compiled as inductor's loops are, and kept between processes with them; meanwhile
    the rest is traced, since that takes four seconds.
    """
    from torch._inductor.codecache import CppCodeCache

    source = Path(__file__).with_suffix(".cpp").read_text()
    return CppCodeCache.load_async(source, extra_flags=("-mavx2", "-mfma"), submit_fn=ThreadPoolExecutor(1).submit)


define("integers(Tensor[] values, Tensor[] scales, Tensor x, int threads) -> Tensor", _empty)  # CPU: integers.cpp
