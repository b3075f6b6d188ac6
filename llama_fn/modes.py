"""What torch is doing right now: whether code is traced, mapped, differentiated, or recorded by a GPU.

No other file asks this. The private names that the answers need are in `private.py`.
"""

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from llama_fn import private
from llama_fn.private import FakeTensor, autocast, graph_is_made, is_wrapped, known_while_tracing, levels

gradients_enabled = torch.is_grad_enabled  # whether torch records what a backward will need


def traced() -> bool:
    """Whether a graph is being made of what runs: by `torch.compile`, `export`, `linearize` or `make_fx`."""
    return compiling() or graph_is_made()


_thread = threading.local()  # each thread traces for itself: another one that runs eagerly meanwhile stays eager


@contextmanager
def tracing_layers() -> Iterator[None]:
    """Within it, this thread is `compiling`, which `make_fx` does not say by itself."""
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
    """Whether `torch.compile` or `jit` traces. They know less of a tensor than `jit_layers` does."""
    return torch.compiler.is_dynamo_compiling()


def by_layers() -> bool:
    """Whether `jit_layers` traces. Its graphs may contain this package's own kernels."""
    return compiling() and not under_dynamo() and not torch.compiler.is_exporting()


def eager() -> bool:
    """Whether neither `torch.compile` nor `export` traces."""
    return not under_dynamo() and not torch.compiler.is_exporting()


def exporting() -> bool:
    """Whether `torch.export` traces. An exported program must not need this package."""
    return torch.compiler.is_exporting()


def concrete(x: Tensor) -> bool:
    """Whether the host can read the numbers in `x` now.

    It cannot where `x` is traced, mapped, differentiated or recorded by a GPU.
    """
    if traced() or x.is_meta or isinstance(x, FakeTensor) or recording(x):
        return False
    return not is_wrapped(x)


def on_gpu(x: Tensor) -> bool:
    """Whether `x` lies on a GPU, which computes later: the host has to wait for it before it can read a number."""
    return x.is_cuda


def unread(x: Tensor) -> bool:
    """Whether nothing checks these numbers before they are used as an index, neither now nor when a graph runs."""
    elsewhere = on_gpu(x) or x.device.type not in ("cpu", "meta") or torch.compiler.is_exporting()
    return elsewhere and not concrete(x)


def recording(x: Tensor) -> bool:
    """Whether a GPU records what is launched, to run it later (a CUDA graph)."""
    return on_gpu(x) and not traced() and torch.cuda.is_current_stream_capturing()


@known_while_tracing
def transforms() -> int:
    """How many of torch.func's transforms are active.

    Forward mode counts twice: its zero tangents leave no trace in a tensor.
    """
    return levels() + private.dual_numbers()


@known_while_tracing
def mapped() -> int:
    """How many examples all `vmap`s around us map together."""
    return math.prod(private.mapped_sizes())


@known_while_tracing
def forward_mode() -> bool:
    """Whether forward mode is active, torch.func's or that of `torch.autograd.forward_ad`."""
    return private.dual_numbers() or private.tangents()


@known_while_tracing
def twice() -> bool:
    """Whether torch.func computes a second derivative."""
    return private.gradients() > 1


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed from these."""
    return gradients_enabled() and any(x.requires_grad for x in tensors)


def values_alone() -> bool:
    """Whether values are all that is asked for: nothing traces, maps or differentiates, and no autocast is on."""
    return not traced() and not transforms() and not autocast()


def plain(tensors: Iterable[Any]) -> bool:
    """Whether these are real tensors that nothing maps, differentiates or casts."""
    if transforms() or autocast():
        return False
    gradients = gradients_enabled()
    return all(type(x) in (Tensor, Parameter) and not (gradients and x.requires_grad) for x in tensors)
