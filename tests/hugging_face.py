"""Models of Hugging Face's transformers beside ours."""

import logging

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import llama_fn as lf

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.enable_propagation()


@pytest.fixture(autouse=True)
def silence(caplog):
    """A word of warning from transformers is a failure, as one from Python is."""
    transformers.utils.logging.warning_once.cache_clear()
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def theirs(config: lf.Config, key: torch.Tensor, tied: bool = False, dtype: torch.dtype = torch.float32,
           sharpness: float = 1.3) -> LlamaForCausalLM:
    """Their model, which hides nothing: norms are not one, and the other weights large enough for sharp attention."""
    rope = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
    if rope["rope_type"] == "llama3":
        rope |= dict(zip(("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
                         config.rope_scaling[2:], strict=True))
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, vocab_size=config.vocab_size, intermediate_size=config.hidden_dim,
        rms_norm_eps=config.norm_eps, rope_parameters={"rope_theta": config.rope_theta, **rope},
        max_position_embeddings=config.max_seq_len, tie_word_embeddings=tied)).eval()
    for i, x in enumerate(model.parameters()):
        inner = lf.random.fold_in(key, i)
        x.data = (lf.random.uniform(inner, x.shape, minval=0.5, maxval=1.5) if x.ndim == 1 else
                  lf.random.normal(inner, x.shape) * sharpness * config.dim**-0.5)
    model.tie_weights()
    return model.to(dtype)


@torch.no_grad()
def logits_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits
