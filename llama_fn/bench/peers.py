"""For comparison only: the same step by transformers, llama.cpp and gpt-fast, of which llama_fn uses none."""

import ctypes
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_fn import private_inductor, tree
from llama_fn.checkpoint.huggingface import to_hf
from llama_fn.model.transformer import Params
from llama_fn.ops.quantized import Grouped, Quantized
from llama_fn.transforms.quantize import dequantize

# How llama.cpp calls each parameter.
LLAMA_CPP = {"embedding": "token_embd", "norm": "output_norm", "output": "output", "attention_norm": "attn_norm",
             "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
             "attention.wo": "attn_output", "ffn_norm": "ffn_norm", "feed_forward.w_gate": "ffn_gate",
             "feed_forward.w_up": "ffn_up", "feed_forward.w_down": "ffn_down"}


def hugging_face(params: Params, batch: int, new: int, context: int, max_len: int) -> Callable[[], Any]:
    """A function that puts `new` tokens a row after `context` others through transformers' model.

    The model is eager and has a static cache. It computes the logits after the last token alone.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    c = params.config
    theirs = LlamaConfig(hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
                         num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size, intermediate_size=c.hidden_dim,
                         max_position_embeddings=max(c.max_seq_len, max_len), rms_norm_eps=c.norm_eps)
    with torch.device("meta"):
        model = LlamaForCausalLM(theirs)
    model.load_state_dict(to_hf(dequantize(params)), assign=True)
    device = params.norm.device
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs).to(device)
    cache = StaticCache(config=theirs, max_cache_len=max_len)
    tokens = torch.zeros((batch, new), dtype=torch.int64, device=device)
    lengths = [length for layer in cache.layers
               if isinstance(length := getattr(layer, "cumulative_length", None), Tensor)]

    def step() -> Tensor:
        if context == 0:
            cache.reset()
        for length in lengths:
            length.fill_(context)  # the next call computes at the same positions again
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    if context:
        with torch.no_grad():
            model(torch.zeros((batch, context), dtype=torch.int64, device=device), past_key_values=cache,
                  use_cache=True)
    return step


def llama_cpp(params: Params, batch: int, new: int, context: int, max_len: int) -> Callable[[], Any]:
    """A function that does the same by llama.cpp, on as many threads as torch has.

    Tensors keep their dtype there; 8-bit weights become Q8_0 and 4-bit weights Q4_0. Raises `ValueError` where
    llama.cpp is not installed (``pip install llama-cpp-python gguf``), and for more than one row.
    """
    for name in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise ValueError("bench: llama.cpp is not installed; pip install llama-cpp-python gguf")
    if batch != 1:
        raise ValueError("bench: llama.cpp is measured with one row only; leave --batch out")
    import llama_cpp as cpp  # pyright: ignore[reportMissingImports]  it is optional

    with tempfile.TemporaryDirectory() as folder:
        _write_gguf(params, Path(folder) / "model.gguf")
        settings = cpp.llama_model_default_params()
        settings.use_mmap = False  # it reads the file, which is deleted then
        model = cpp.llama_model_load_from_file(str(Path(folder) / "model.gguf").encode(), settings)
    limits = cpp.llama_context_default_params()
    limits.n_ctx, limits.n_batch, limits.n_ubatch = max_len, max(context, new), 512
    limits.n_threads = limits.n_threads_batch = torch.get_num_threads()
    state = cpp.llama_init_from_model(model, limits)
    memory = cpp.llama_get_memory(state)

    def feed(count: int) -> None:
        tokens = (cpp.llama_token * count)(*[300 + i for i in range(count)])
        if cpp.llama_decode(state, cpp.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama.cpp could not decode the tokens")

    if context:
        feed(context)

    def step() -> Any:
        cpp.llama_memory_seq_rm(memory, 0, context, -1)
        feed(new)
        return ctypes.cast(cpp.llama_get_logits(state), ctypes.c_void_p)  # this waits until they are computed

    return step


class Int8Linear(nn.Module):
    """A linear layer with an 8-bit matrix, computed as in gpt-fast's quantize.py."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Quantized, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight.values)
        self.register_buffer("scales", weight.scale.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The product with the integers, times one scale an output."""
        return nn.functional.linear(x, self.weight.to(x.dtype)) * self.scales


def gpt_fast(params: Params, batch: int, new: int, context: int, max_len: int) -> Callable[[], Any]:
    """A function that decodes one token a row by gpt-fast, compiled as in its generate.py.

    The environment variable GPT_FAST names a clone of github.com/pytorch-labs/gpt-fast at 32971d3. Raises `ValueError`
    where there is none, for more than one token a step, and for 4-bit weights.
    """
    folder = Path(os.environ.get("GPT_FAST", ""))
    if not (folder / "model.py").is_file():
        raise ValueError("bench: gpt-fast is not found; name a clone of it in the environment variable GPT_FAST")
    if new != 1 or isinstance(params.output, Grouped):
        raise ValueError("bench: gpt-fast is measured with one token a step, and not with int4")

    spec = importlib.util.spec_from_file_location("gpt_fast_model", folder / "model.py")
    assert spec is not None and spec.loader is not None, "a Python file has a loader"
    theirs = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks for it there
    spec.loader.exec_module(theirs)
    c, device, dtype = params.config, params.norm.device, params.norm.dtype
    with torch.device("meta"):
        model = theirs.Transformer(theirs.ModelArgs(
            block_size=max(c.max_seq_len, max_len), vocab_size=c.vocab_size, n_layer=c.n_layers, n_head=c.n_heads,
            dim=c.dim, intermediate_size=c.hidden_dim, n_local_heads=c.n_kv_heads, rope_base=c.rope_theta,
            norm_eps=c.norm_eps))

    def put(place: nn.Module, name: str, *weights: Any) -> None:
        if isinstance(weights[0], Quantized):
            parts = [w.flat() for w in weights]
            setattr(place, name, Int8Linear(Quantized(*map(torch.cat, zip(*parts, strict=True))), dtype))
        else:
            rows = [w.flatten(1) if name == "wo" else w.reshape(-1, w.shape[-1]) if w.ndim > 1 else w for w in weights]
            getattr(place, name).weight = nn.Parameter(torch.cat(rows), requires_grad=False)

    put(model, "tok_embeddings", params.embedding)
    put(model, "norm", params.norm)
    put(model, "output", params.output)
    for layer, block in zip(model.layers, params.blocks, strict=True):
        put(layer, "attention_norm", block.attention_norm)
        put(layer.attention, "wqkv", block.attention.wq, block.attention.wk, block.attention.wv)
        put(layer.attention, "wo", block.attention.wo)
        put(layer, "ffn_norm", block.ffn_norm)
        for name, matrix in zip(("w1", "w3", "w2"), block.feed_forward, strict=True):
            put(layer.feed_forward, name, matrix)
    with torch.device(device):
        model.setup_caches(batch, max_len)

    def greedy(tokens: Tensor, position: Tensor) -> Tensor:
        return model(tokens, position)[:, -1].argmax(-1, keepdim=True)

    run = torch.compile(greedy, mode="reduce-overhead", fullgraph=True)
    tokens = torch.zeros((batch, 1), dtype=torch.int64, device=device)
    position = torch.full((1,), context, dtype=torch.int64, device=device)

    def step() -> Tensor:
        kernels = torch.nn.attention.SDPBackend.MATH
        options = private_inductor.inductor().config.patch({"coordinate_descent_tuning": True})
        with options, torch.nn.attention.sdpa_kernel(kernels):
            return run(tokens, position).clone()

    return step


def _write_gguf(params: Params, file: Path) -> None:
    """Write the weights as a file that llama.cpp reads."""
    import gguf  # pyright: ignore[reportMissingImports]  it is optional

    c = params.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>".encode() for i in range(c.vocab_size)])
    writer.add_token_scores([0.0] * c.vocab_size)
    writer.add_token_types([1] * c.vocab_size)
    kinds = gguf.GGMLQuantizationType
    quantized = {Quantized: kinds.Q8_0, Grouped: kinds.Q4_0}.get(type(params.output))
    for path, x in tree.paths(dequantize(params)).items():
        *place, name = path.split(".", 2)  # "blocks.3.attention.wq", or "output"
        layer = f"blk.{place[1]}." if place else ""
        inputs = x.shape[1:].numel() if name == "attention.wo" else x.shape[-1]
        numbers = x.float().reshape(-1, inputs) if x.ndim > 1 else x.float()
        kind = kinds.F32 if x.ndim == 1 else quantized or getattr(kinds, {"bfloat16": "BF16", "float16": "F16"}.get(
            str(x.dtype).removeprefix("torch."), "F32"))
        data = gguf.quants.quantize(numbers.numpy(), kind)
        writer.add_tensor(f"{layer}{LLAMA_CPP[name]}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
