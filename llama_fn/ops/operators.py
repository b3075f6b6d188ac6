"""The package's own kernels as torch operators, so that a compiled graph can call them."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("llama_fn", "DEF")


def define(schema: str, empty: Callable, **kernels: Callable) -> None:
    """Define an operator. `empty` allocates its result while tracing; `kernels` compute it, by device (CUDA=...)."""
    LIBRARY.define(schema)
    for device, kernel in {"Meta": empty, **kernels}.items():
        LIBRARY.impl(schema.partition("(")[0], kernel, device)
