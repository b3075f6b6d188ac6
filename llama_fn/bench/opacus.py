"""For comparison only: the same model built of `torch.nn` modules, whose per-sample gradients Opacus computes."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama_fn import tree
from llama_fn.config import Config
from llama_fn.model.rope import Rotation, rotate, rotation
from llama_fn.model.transformer import Params


class Layer(nn.Module):
    """A transformer block in which each weight has a module, because Opacus puts its hooks on modules."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, h, f = config.dim, config.head_dim, config.hidden_dim
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(d, config.norm_eps) for _ in range(2))
        self.wq = nn.Linear(d, config.n_heads * h, bias=False)
        self.wk, self.wv = (nn.Linear(d, config.n_kv_heads * h, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.n_heads * h, d, bias=False)
        self.w_gate, self.w_up = (nn.Linear(d, f, bias=False) for _ in range(2))
        self.w_down, self.head_dim = nn.Linear(f, d, bias=False), h

    def forward(self, x: Tensor, angles: Rotation) -> Tensor:
        """The block's output."""
        seen = self.attention_norm(x)
        q, k, v = (w(seen).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, angles), rotate(k, angles), v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.wo(heads.transpose(1, 2).flatten(2))
        seen = self.ffn_norm(x)
        return x + self.w_down(nn.functional.silu(self.w_gate(seen)) * self.w_up(seen))


class Transformer(nn.Module):
    """The whole model, from tokens to logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.embedding = config, nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits after each token."""
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        angles = rotation(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embedding(tokens)
        for layer in self.blocks:
            x = layer(x, angles)
        return self.output(self.norm(x))


def opacus_grads(params: Params, tokens: Tensor) -> Callable[[], dict[str, Tensor]] | None:
    """A function that computes one gradient of the loss for each row of tokens, by the paths of `params`.

    It is None where Opacus is not installed.
    """
    try:
        from opacus.grad_sample import GradSampleModule  # pyright: ignore[reportMissingImports]  it is optional
    except ImportError:
        return None
    module, weights = Transformer(params.config), tree.paths(params)
    path = {p.replace("attention.", "").replace("feed_forward.", "") + ".weight": p for p in weights}
    for name, weight in module.named_parameters():
        weight.data.copy_(weights[path[name]].reshape(weight.shape))
    hooked = GradSampleModule(module, loss_reduction="sum")
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # integers have no gradient

    def run() -> dict[str, Tensor]:
        for weight in module.parameters():
            weight.grad = None
            vars(weight)["grad_sample"] = None
        logits = hooked(tokens[:, :-1])
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        nats.unflatten(0, (len(tokens), -1)).mean(1).sum().backward()
        return {path[name]: vars(weight)["grad_sample"] for name, weight in module.named_parameters()}

    return run
