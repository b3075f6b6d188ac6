"""The names of Hugging Face's weights, and the order of the rows of `wq` and `wk`."""

from einops import rearrange
from torch import Tensor

from llama_fn.config import Config

NAMES = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention": "self_attn",
         "feed_forward": "mlp", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w_gate": "gate_proj",
         "w_up": "up_proj", "w_down": "down_proj", "blocks": "layers", "embedding": "embed_tokens"}
HEAD = "lm_head.weight"


def to_halves(x: Tensor, heads: int) -> Tensor:
    """Rows of interleaved pairs, (2i, 2i + 1), to those of halves, (i, i + h/2), head by head."""
    return rearrange(x, "(n p two) d -> (n two p) d", n=heads, two=2)


def to_interleaved(x: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return rearrange(x, "(n two p) d -> (n p two) d", n=heads, two=2)


def hf_name(path: str) -> str:
    """`blocks.0.feed_forward.w_gate` -> `model.layers.0.mlp.gate_proj.weight`."""
    if path == "output":
        return HEAD
    return ".".join(["model", *(NAMES.get(part, part) for part in path.split(".")), "weight"])


def rope_heads(path: str, config: Config) -> int | None:
    """How many heads the rows of a weight have that RoPE turns; None for those it leaves alone."""
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(path.split(".")[-1])
