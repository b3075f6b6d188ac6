"""What the options of several subcommands mean."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from llama_fn import lora
from llama_fn.bench.device import device_of
from llama_fn.checkpoint.load import Model, load
from llama_fn.transforms.quantize import Bits, quantize

Dtype = Literal["stored", "float32", "bfloat16", "float16"]
MaxNewTokens = Annotated[int | None, tyro.conf.arg(aliases=["-n"])]
Context = Annotated[int | None, tyro.conf.arg(aliases=["-c"])]


def dtype_of(name: Dtype) -> torch.dtype | None:
    """A dtype by its name; None, which `load` understands, for the dtype of the file."""
    return None if name == "stored" else getattr(torch, name)


def model_of(name: str, adapter: Path | None, dtype: Dtype, device: str, bits: Bits | None = None) -> Model:
    """The model of a name or folder, with the LoRA adapter of another folder merged into it, if there is one, and
    quantized then, if `bits` says so."""
    first = None if adapter else bits
    model = load(name, dtype=dtype_of(dtype), device=device_of(device), quantize=first)
    if adapter is None:
        return model
    params = lora.merge(model.params, lora.load(adapter, model.params))
    return model._replace(params=params if bits is None else quantize(params, bits))


def within(model: Model, context: int | None) -> Model:
    """The model with a shorter context: prompt and answer together have as many tokens at most, and the cache room for
    no more.
    """
    longest = model.params.config.max_seq_len
    if context is None:
        return model
    if not 2 <= context <= longest:
        raise ValueError(f"--context must lie in [2, {longest}], the context that the model was trained for, "
                         f"got {context}")
    config = dataclasses.replace(model.params.config, max_seq_len=context)
    return model._replace(params=model.params._replace(config=config))
