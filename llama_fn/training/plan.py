"""The plan of a training run: the numbers that it depends on."""

from dataclasses import dataclass

from llama_fn.config import Config
from llama_fn.ranges import integer, number
from llama_fn.training import optim
from llama_fn.training.schedule import warmup_cosine


@dataclass(frozen=True)
class Plan:
    """How a run goes, from the first random number to the last step."""

    dim: int = 144
    """The model's width."""
    n_layers: int = 4
    n_heads: int = 6
    n_kv_heads: int = 2
    hidden_dim: int = 256
    """The feed-forward's hidden width."""
    vocab_size: int = 1024
    context: int = 256
    """Tokens a row."""
    steps: int = 4000
    batch: int = 32
    """Rows a micro-batch."""
    micro_batches: int = 1
    """Micro-batches a step, gone through one after another to save memory."""
    learning_rate: float = 2e-3
    """The highest, after the warmup."""
    final_learning_rate: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    """The largest norm of the gradient."""
    stories: int = 200_000
    """How many stories to train on, if no text is given."""
    seed: int = 0

    def check(self) -> None:
        """Raise `ValueError` for a setting out of its range."""
        for name in ("context", "steps", "batch", "micro_batches", "stories"):
            integer(name, getattr(self, name), 1)
        for name in ("learning_rate", "clip"):
            number(name, getattr(self, name), above=True)
        for name in ("final_learning_rate", "weight_decay"):
            number(name, getattr(self, name))

    def config(self) -> Config:
        return Config(self.dim, self.n_layers, self.n_heads, self.n_kv_heads, self.vocab_size, self.hidden_dim,
                      max_seq_len=self.context)

    def optimizer(self) -> optim.Optimizer:
        rate = warmup_cosine(self.learning_rate, self.warmup, self.steps, self.final_learning_rate)
        return optim.chain(optim.clip_by_global_norm(self.clip),
                           optim.adamw(rate, 0.9, 0.99, weight_decay=self.weight_decay, mask=optim.matrices))
