"""How Hugging Face names LLaMA's weights, and in which order it stores the rows of ``wq`` and ``wk``.

RoPE rotates pairs of rows of each head. Meta's layout and ours rotate rows (2i, 2i + 1): the interleaved order.
Hugging Face rotates rows (i, i + h/2): the halves order. The rows of ``wq`` and ``wk`` are therefore permuted on the
way in and out, as in transformers' ``convert_llama_weights_to_hf.py``.
"""

from einops import rearrange
from torch import Tensor

from llama_fn.config import Config

NAMES = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention": "self_attn",
         "feed_forward": "mlp", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w_gate": "gate_proj",
         "w_up": "up_proj", "w_down": "down_proj", "blocks": "layers", "embedding": "embed_tokens"}
LM_HEAD = "lm_head.weight"


def to_halves(x: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from interleaved pairs (2i, 2i + 1) to halves (i, i + h/2)."""
    return rearrange(x, "(n p two) d -> (n two p) d", n=heads, two=2)


def to_interleaved(x: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from halves to interleaved pairs: the inverse of `to_halves`."""
    return rearrange(x, "(n two p) d -> (n p two) d", n=heads, two=2)


def hf_name(path: str) -> str:
    """Hugging Face's name of a weight.

    "blocks.0.feed_forward.w_gate" becomes "model.layers.0.mlp.gate_proj.weight".
    """
    if path == "output":
        return LM_HEAD
    return ".".join(["model", *(NAMES.get(part, part) for part in path.split(".")), "weight"])


def rope_heads(path: str, config: Config) -> int | None:
    """The number of heads in a weight whose rows RoPE rotates; None for every other weight."""
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(path.split(".")[-1])
