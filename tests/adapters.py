"""Adapters that change the logits, as several tests use them."""

import torch
from hypothesis import strategies as st

import llama_fn as lf
from llama_fn import lora, tree

CONFIG = lf.Config(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)

ALL = (*lora.LINEAR, "output")

targets = st.lists(st.sampled_from(ALL), min_size=1, unique=True)


def trained(key: torch.Tensor, params: lf.Params, rank: int = 3, names=ALL, alpha: float = 5.0,
            dtype: torch.dtype | None = None) -> lora.Lora:
    """An adapter whose B is not zero any more, and which changes the logits about as much as the weights do."""
    adapter = lora.init(key, params, rank, names, alpha=alpha, dtype=dtype)
    return tree.map_with_path(lambda path, x: x + path.endswith(".b") * lf.random.normal(
        lf.random.fold_in(key, sum(map(ord, path))), x.shape, torch.float64).to(x.dtype) / 9, adapter)
