"""Compiles the C++ kernels on this machine, and loads them.

They need Linux and a processor with AVX2 or AVX-512. Torch's own kernels for the same work do not reach the memory's
speed (its 4-bit kernel reads 7 GB/s of 30). Inductor's loops compute only with floats, read each weight once per row,
reach a third of these kernels' speed in attention, and take twice as long to trace.
"""

import functools
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Graph

from llama_fn.private import FakeTensor
from llama_fn.private_inductor import load_cpp

# The kernels of each library. A kernel is an operator, and also the name of its source file.
DECODE = ("linear_floats", "linear_integers", "attend_one_query", "decode_layers")
PREFILL = ("attend_many_queries",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the numbers that the kernels read and write


def vector_instructions() -> str:
    """The processor's vector instructions, "AVX2" or "AVX512"; "" where the kernels cannot be compiled."""
    capability = torch.backends.cpu.get_cpu_capability() if sys.platform == "linux" else ""
    return capability if capability in ("AVX2", "AVX512") else ""


def load(library: tuple[str, ...] = DECODE) -> None:
    """Compile and load a library, unless it is loaded."""
    try:
        _libraries()[library].result()
    except Exception:
        _libraries.cache_clear()  # The next call tries again, because a full disk may have room by then.
        raise


def load_for(x: Tensor, library: tuple[str, ...]) -> None:
    """Load a library whose kernel is to read `x`. While tracing, only begin to compile it, since nothing runs yet."""
    _libraries() if isinstance(x, FakeTensor) else load(library)


def load_for_graph(graph: Graph) -> None:
    """Load the libraries whose kernels a graph calls."""
    called = {node.target for node in graph.nodes}
    for library in (DECODE, PREFILL):
        if any(getattr(torch.ops.llama_fn, kernel).default in called for kernel in library):
            load(library)


@functools.cache
def _libraries() -> dict[tuple[str, ...], Future]:
    """The libraries as futures: two threads compile them, which takes six seconds, while a step is traced.

    Inductor compiles them with its own flags, and keeps them on disk for later processes.
    """
    threads = ThreadPoolExecutor(2)
    flags = ("-mavx2", "-mfma", "-mf16c")
    return {library: threads.submit(load_cpp, _source(library), flags) for library in (DECODE, PREFILL)}


def _source(library: tuple[str, ...]) -> str:
    """The source of a library as one text: each kernel's file and the headers that it includes, every header once.

    The first line names the vector instructions, since different processors may share the folder of compiled code.
    """
    included = set()

    def read(name: str) -> str:
        if name in included:
            return ""
        included.add(name)
        text = Path(__file__).with_name(name).read_text().replace("#pragma once\n", "")
        return re.sub(r'#include "(.*)"', lambda header: read(header[1]), text)

    return f"// {vector_instructions()}\n" + "".join(read(f"{kernel}.cpp") for kernel in library)
