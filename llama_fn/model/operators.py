"""Kernels of this package's own, as operators of torch's, so that a compiled graph can hold them."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("llama_fn", "DEF")


def define(schema: str, kernel: Callable, empty: Callable, device: str) -> None:
    """Make an operator of a kernel for "CPU" or "CUDA", and of what says where its result goes."""
    LIBRARY.define(schema)
    LIBRARY.impl(schema.partition("(")[0], kernel, device)
    LIBRARY.impl(schema.partition("(")[0], empty, "Meta")
