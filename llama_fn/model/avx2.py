"""Few rows times matrices on a processor with AVX2, by kernels in C++: `integers.cpp`, and of several `floats.cpp`.

Torch has none that read at the memory's speed there (its own of four bits reads 7 GB/s of 30). Inductor's loops know
floats alone, and go through a weight's numbers for each row by itself.
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

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def takes(weight: Any, x: Tensor) -> bool:
    """Whether `sums` computes this; integers, but for what inputs lose, which must be few bits already."""
    rows, d = x.shape[:-1].numel(), x.shape[-1]
    if x.device.type != "cpu" or not 0 < rows <= most(weight) or d == 0 or not level():
        return False
    if isinstance(weight, Tensor):  # of fewer rows, loops are as fast
        return rows > 3 and d % 8 == 0 and weight.dtype == x.dtype in FLOATS and weight.is_contiguous()
    return (isinstance(weight, Quantized | Grouped) and weight.values.is_contiguous() and as_made(weight)
            and x.dtype in (torch.bfloat16, torch.float16) and d % GROUP == 0)


def most(weight: Any) -> int:
    """The rows for which these kernels are the fastest. (With AVX-512, torch's for floats may be.)"""
    return 8 if not isinstance(weight, Tensor) else 32 if level() == "AVX2" else 0


def sums(weights: Sequence[Tensor | Quantized | Grouped], x: Tensor) -> list[Tensor]:
    """Of weights "... d" of one kind and rows "r d", in float32, the outputs "r o". Beside integers, an input is off by
    at most 2^-16 of the largest of its 64.
    """
    floats = isinstance(weights[0], Tensor)
    load = _compiled("floats" if floats else "integers")
    if not isinstance(x, FakeTensor):
        load()
    values = [w if floats else w.values for w in weights]
    scales = [w.scale for w in weights if isinstance(w, Grouped)]
    rest = x.float().contiguous(), torch.get_num_threads()
    rows = torch.ops.llama_fn.floats(values, *rest) if floats else torch.ops.llama_fn.integers(values, scales, *rest)
    ys = rows.split([math.prod(w.shape[:-1]) for w in weights], -1)
    return [y * w.scale.flatten() if isinstance(w, Quantized) else y for y, w in zip(ys, weights, strict=True)]


def _empty_floats(values: list[Tensor], x: Tensor, threads: int) -> Tensor:
    return x.new_empty((x.shape[0], sum(value.numel() // x.shape[-1] for value in values)))


def _empty_integers(values: list[Tensor], scales: list[Tensor], x: Tensor, threads: int) -> Tensor:
    width = x.shape[-1] // 2 if scales else x.shape[-1]
    return x.new_empty((x.shape[0], sum(value.numel() // width for value in values)))


def level() -> str:
    """What the processor has, "AVX2" or "AVX512"; "" where these kernels are not made."""
    capability = torch.backends.cpu.get_cpu_capability() if sys.platform == "linux" else ""
    return capability if capability in ("AVX2", "AVX512") else ""


def ready(graph: Graph) -> None:
    """Wait for the kernels that a graph has."""
    for name in ("floats", "integers"):
        if graph.find_nodes(op="call_function", target=getattr(torch.ops.llama_fn, name).default):
            _compiled(name)()


@functools.cache
def _compiled(name: str) -> Callable[[], object]:
    """What loads a kernel. It is compiled as inductor's loops are, and kept between processes with them; meanwhile the
    rest is traced, since that takes four seconds.
    """
    from torch._inductor.codecache import CppCodeCache

    source = Path(__file__).with_name(f"{name}.cpp").read_text()
    return CppCodeCache.load_async(source, extra_flags=("-mavx2", "-mfma", "-mf16c"),
                                   submit_fn=ThreadPoolExecutor(1).submit)


# Their kernels for the CPU are in C++.
define("floats(Tensor[] values, Tensor x, int threads) -> Tensor", _empty_floats)
define("integers(Tensor[] values, Tensor[] scales, Tensor x, int threads) -> Tensor", _empty_integers)
