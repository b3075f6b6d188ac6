"""Torch's private names of inductor, the compiler beneath dynamo in `torch.compile`.

They change without notice (see `private.py`). This package calls them directly, because dynamo takes five times as long
to trace a layer, and 0.1 ms a call. Importing them takes seconds, so they are imported when something is compiled.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import torch

KNOWN = ("2.13.",)  # the versions of torch that are known to have all names in this file


def lacking() -> str | None:
    """Which of the names in this file this torch does not have, or None.

    A known version is not asked: the import takes 0.6 s, and a short decode step may never need it.
    """
    if torch.__version__.startswith(KNOWN):
        return None
    try:
        tensor_guards()
        inductor()
    except (ImportError, AttributeError) as error:
        return f"torch {torch.__version__} is one that this package was not written for ({error})"
    return None


def tensor_guards() -> Any:
    """The class that compares tensors with those of a trace. Its import takes no time."""
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards


def inductor() -> SimpleNamespace:
    """The parts of `torch.compile` beneath dynamo, which turn a graph into code. Their import takes two seconds."""
    import torch._inductor.codecache as code
    from torch._functorch import config as partitioning
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode

    return SimpleNamespace(
        same_once=fx_graph_cse, partition=min_cut_rematerialization_partition,
        partitioning=partitioning, config=config, compile=compile_fx_inner,
        decompositions=select_decomp_table, set_fakes=V.set_fake_mode, FakeTensorMode=FakeTensorMode,
        tracing=lambda fakes: tracing(TracingContext(fakes)),
        # What inductor asks once in a process: a hash of torch's and Triton's sources, and what g++ can compile for.
        questions=(code.torch_key, code.CacheBase.get_system), instructions=pick_vec_isa, headers=code._HEADER_DIR)


def load_cpp(source: str, flags: tuple[str, ...]) -> Any:
    """Compile C++ as inductor compiles its loops, and load it. Inductor keeps the result for later processes.

    `torch.utils.cpp_extension` needs ninja, and takes five times as long.
    """
    from torch._inductor.codecache import CppCodeCache

    # The flags name the vector instructions, so inductor need not ask g++ for them. Torch 2.11 asks all the same.
    known = "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters
    return CppCodeCache.load(source, extra_flags=flags, **({"needs_vec_isa": False} if known else {}))
