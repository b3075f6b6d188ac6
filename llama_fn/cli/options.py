"""Options that several subcommands share."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from llama_fn import lora
from llama_fn.bench.device import device_of
from llama_fn.checkpoint.load import Model, load
from llama_fn.mesh.world import ALONE, World
from llama_fn.transforms.quantize import Bits, quantize

Dtype = Literal["stored", "float32", "bfloat16", "float16"]
MaxNewTokens = Annotated[int | None, tyro.conf.arg(aliases=["-n"])]
Context = Annotated[int | None, tyro.conf.arg(aliases=["-c"])]


def dtype_of(name: Dtype) -> torch.dtype | None:
    """The dtype of a name. It is None for "stored": `load` then keeps the dtype of the file."""
    return None if name == "stored" else getattr(torch, name)


def model_of(name: str, adapter: Path | None, dtype: Dtype, device: str, bits: Bits | None = None,
             world: World = ALONE) -> Model:
    """The model of a name or folder.

    `adapter` is a folder with a LoRA adapter, which is merged into the weights. `bits` quantizes the matrices, after an
    adapter was merged. On a mesh, each process loads its part, and the adapter stays beside the weights.
    """
    if world.mesh is not None:
        model = load(name, dtype=dtype_of(dtype), device=device_of(device), quantize=bits, mesh=world.mesh,
                     plan=world.plan)
        if adapter is None:
            return model
        return model._replace(params=lora.apply(model.params, world.part(lora.load(adapter, model.params))))
    if adapter is None:
        return load(name, dtype=dtype_of(dtype), device=device_of(device), quantize=bits)
    model = load(name, dtype=dtype_of(dtype), device=device_of(device))
    params = lora.merge(model.params, lora.load(adapter, model.params))
    return model._replace(params=params if bits is None else quantize(params, bits))


def with_context(model: Model, context: int | None) -> Model:
    """The model with a shorter context: the most tokens of a prompt and its continuation together.

    The cache then has no room for more. None leaves the context as it is. Raises `ValueError` for a context longer than
    the one that the model was trained for.
    """
    longest = model.params.config.max_seq_len
    if context is None:
        return model
    if not 2 <= context <= longest:
        raise ValueError(f"--context must lie in [2, {longest}], the context that the model was trained for, "
                         f"got {context}")
    config = dataclasses.replace(model.params.config, max_seq_len=context)
    return model._replace(params=model.params._replace(config=config))
