"""What `llama-fn bench decode|prefill|train|startup` measures: a model's shape and dtype, its rows and its cache."""

import math
from typing import Any, Literal, NamedTuple

import torch

from llama_fn import tree
from llama_fn.bench.device import device_of
from llama_fn.checkpoint.load import load
from llama_fn.config import LLAMA2_7B, Config
from llama_fn.model.cache import Cache, init_cache
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params
from llama_fn.transforms.quantize import quantized_leaf

SHAPES = {
    "tinyllama": Config(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000, hidden_dim=5632,
                        max_seq_len=2048),
    "llama2-7b": LLAMA2_7B,
    "small": Config(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, vocab_size=1024, hidden_dim=688, max_seq_len=512),
    "15m": Config(dim=384, n_layers=8, n_heads=6, n_kv_heads=6, vocab_size=1024, hidden_dim=1024, max_seq_len=512),
    "30m": Config(dim=512, n_layers=10, n_heads=8, n_kv_heads=4, vocab_size=2048, hidden_dim=1376, max_seq_len=512),
    "stories": None,  # the shipped model
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16,
          "int8": torch.bfloat16, "int4": torch.bfloat16}


class Work(NamedTuple):
    """What is measured.

    `shape` names the model's sizes: the weights are random, but for "stories", which is the shipped model. With the
    dtypes "int8" and "int4" the matrices are quantized and everything else is in bfloat16. `batch` is the number of
    rows, `context` the number of tokens in each row of the cache, and `max_len` the number of its slots. The device
    "auto" is a GPU if there is one. `compare` names other programs that do the same work in turn with llama_fn.
    """

    shape: Literal["tinyllama", "llama2-7b", "small", "15m", "30m", "stories"] = "tinyllama"
    dtype: Literal["bfloat16", "float32", "float16", "int8", "int4"] = "bfloat16"
    batch: int = 1
    context: int = 128
    max_len: int = 1024
    device: str = "auto"
    compare: tuple[Literal["hf", "llama.cpp", "gpt-fast", "module"], ...] = ()


def check(work: Work) -> None:
    """Raise `ValueError` for settings that do not go together."""
    if not 0 < work.context < work.max_len:
        raise ValueError(f"bench: a context must lie between 0 and max_len = {work.max_len}, got {work.context}")
    if work.batch < 1:
        raise ValueError(f"bench: a batch has at least one row, got {work.batch}")
    if "llama.cpp" in work.compare and device_of(work.device).type == "cuda":
        raise ValueError("bench: llama.cpp is measured on the CPU; use --device cpu")


def weights(work: Work) -> Params:
    """Random weights (their standard deviation of 0.02 overflows nowhere), or those of the shipped model."""
    dtype, device = DTYPES[work.dtype], device_of(work.device)
    config, bits = SHAPES[work.shape], work.dtype if work.dtype in ("int8", "int4") else None
    if config is None:
        return load("stories", dtype=dtype, device=device, quantize=bits).params
    generator = torch.Generator(device).manual_seed(0)

    def drawn(path: str, weight: Weight) -> Any:
        x = torch.empty(weight.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        return x if bits is None else quantized_leaf(bits)(path, weight, x)

    return tree.map_with_path(drawn, abstract_params(config))


def matrix_numbers(config: Config) -> int:
    """How many weights each token is multiplied with: those of all matrices, without the embedding."""
    shapes = tree.paths(abstract_params(config)).items()
    return sum(math.prod(x.shape) for path, x in shapes if x.std is not None and path != "embedding")


def filled(config: Config, work: Work, dtype: torch.dtype) -> Cache:
    """A cache that already holds `work.context` tokens in each row; all keys and values are 0."""
    cache = init_cache(config, (work.batch,), max_len=work.max_len, dtype=dtype, device=device_of(work.device))
    return cache._replace(length=torch.full_like(cache.length, work.context))
