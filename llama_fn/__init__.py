"""LLaMA 2 as stateless pure functions in PyTorch."""

from llama_fn import lora, mesh, quiet, random, stories, tree  # noqa: F401  quiet: torch's warnings about itself stay unsaid
from llama_fn.checkpoint.huggingface import from_hf, to_hf
from llama_fn.checkpoint.load import Model, load, save
from llama_fn.compiled.jit import jit
from llama_fn.compiled.layers import jit_layers
from llama_fn.config import LLAMA2_7B, LLAMA2_13B, LLAMA2_70B, Config, RopeScaling
from llama_fn.generation.chat import Message, chat_completion
from llama_fn.generation.completion import Completion, stream, text_completion
from llama_fn.generation.conversation import Chat, answer, ask
from llama_fn.generation.dialog import DialogTokens, dialog_tokens
from llama_fn.generation.drafted import Speculation, speculate, speculate_stream
from llama_fn.generation.generate import Generation, generate
from llama_fn.generation.perplexity import Perplexity, perplexity
from llama_fn.generation.sampling import narrowing, sampler
from llama_fn.generation.scoring import Score, score, score_options
from llama_fn.memory import keep_memory
from llama_fn.model.block import Block, block
from llama_fn.model.cache import Cache, NoCache, init_cache
from llama_fn.model.fork import fork, select
from llama_fn.model.init import abstract_params, init_params
from llama_fn.model.transformer import Params, forward, head, trunk
from llama_fn.shapes import AxesError, typed
from llama_fn.tokenizer import Tokenizer, load_tokenizer
from llama_fn.tokenizer_training import train_tokenizer
from llama_fn.training import optim
from llama_fn.training.dpo import dpo_loss
from llama_fn.training.loss import loss, loss_sum
from llama_fn.transforms.per_sample import clipped_sum, per_sample_grads, per_sample_norms, private_grads
from llama_fn.transforms.quantize import dequantize, quantize
from llama_fn.transforms.remat import remat

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "LLAMA2_7B", "LLAMA2_13B", "LLAMA2_70B", "AxesError", "Block", "Cache", "Chat", "Completion", "Config",
    "DialogTokens", "Generation", "Message", "Model", "NoCache", "Params", "Perplexity", "RopeScaling", "Score",
    "Speculation", "Tokenizer", "abstract_params", "answer", "ask", "block", "chat_completion", "clipped_sum",
    "dequantize", "dialog_tokens", "dpo_loss", "fork", "forward", "from_hf", "generate", "head", "init_cache",
    "init_params", "jit", "jit_layers", "keep_memory", "load", "load_tokenizer", "lora", "loss", "loss_sum", "mesh",
    "narrowing", "optim", "per_sample_grads", "per_sample_norms", "perplexity", "private_grads", "quantize", "random",
    "remat", "sampler", "save", "score", "score_options", "select", "speculate", "speculate_stream", "stories",
    "stream", "text_completion", "to_hf", "train_tokenizer", "tree", "trunk", "typed",
]
