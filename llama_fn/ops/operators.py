"""Kernels of this package's own, as operators of torch's, so that a compiled graph can hold them."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("llama_fn", "DEF")


def define(schema: str, empty: Callable, **kernels: Callable) -> None:
    """Make an operator of what says where its result goes, and of the kernels by their device, as CUDA=..."""
    LIBRARY.define(schema)
    for device, kernel in {"Meta": empty, **kernels}.items():
        LIBRARY.impl(schema.partition("(")[0], kernel, device)
