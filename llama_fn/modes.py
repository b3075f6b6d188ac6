"""What torch is doing right now: whether what runs is traced, mapped, differentiated, or recorded by a GPU."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llama_fn import private
from llama_fn.private import FakeTensor, graph_is_made, is_wrapped, known_while_tracing, levels


def traced() -> bool:
    """Whether what runs now is written down as a graph: by `torch.compile`, `export`, `linearize` or `make_fx`."""
    return compiling() or graph_is_made()


_thread = threading.local()  # each thread traces for itself: another that runs eagerly meanwhile stays eager


@contextmanager
def tracing_layers() -> Iterator[None]:
    """Within it, this thread is `compiling`. (`make_fx` does not say so by itself.)"""
    before = getattr(_thread, "tracing", False)
    _thread.tracing = True
    try:
        yield
    finally:
        _thread.tracing = before


def compiling() -> bool:
    """Whether a compiled step is being made, by `torch.compile` or by `jit_layers`."""
    return torch.compiler.is_compiling() or getattr(_thread, "tracing", False)


def under_dynamo() -> bool:
    """Whether `torch.compile` or `jit` traces, which knows less of a tensor than `jit_layers`."""
    return torch.compiler.is_dynamo_compiling()


def by_layers() -> bool:
    """Whether `jit_layers` traces: then a graph may hold this package's own kernels."""
    return compiling() and not under_dynamo() and not torch.compiler.is_exporting()


def eager() -> bool:
    """Whether neither `torch.compile` nor `export` traces."""
    return not under_dynamo() and not torch.compiler.is_exporting()


def concrete(x: Tensor) -> bool:
    """Whether the numbers in `x` can be read on the host now: neither traced, mapped or differentiated, nor recorded
    by a GPU.
    """
    if traced() or x.is_meta or isinstance(x, FakeTensor) or recording(x):
        return False
    return not is_wrapped(x)


def far(x: Tensor) -> bool:
    """Whether the tensor lies on a GPU, which does later what it is told, and has to be waited for."""
    return x.is_cuda


def unread(x: Tensor) -> bool:
    """Whether nothing reads these numbers before they are used as an index, now or when a graph runs."""
    elsewhere = far(x) or x.device.type not in ("cpu", "meta") or torch.compiler.is_exporting()
    return elsewhere and not concrete(x)


def recording(x: Tensor) -> bool:
    """Whether a GPU writes down what it is told to do, and does it later (a CUDA graph)."""
    return far(x) and not traced() and torch.cuda.is_current_stream_capturing()


@known_while_tracing
def transforms() -> int:
    """How many of torch.func's transforms are at work; forward mode counts twice, since its zeros are not in a leaf."""
    return levels() + private.dual_numbers()


@known_while_tracing
def mapped() -> int:
    """How many examples all `vmap`s around us map together."""
    return math.prod(private.mapped_sizes())


@known_while_tracing
def forward_mode() -> bool:
    """Whether there are dual numbers around us, torch.func's or plain ones."""
    return private.dual_numbers() or private.tangents()


@known_while_tracing
def twice() -> bool:
    """Whether torch.func asks for a second derivative."""
    return private.gradients() > 1
