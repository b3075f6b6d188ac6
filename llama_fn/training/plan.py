"""`Plan`: all numbers that a training run depends on."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llama_fn.config import Config
from llama_fn.ranges import integer, number
from llama_fn.tokenizer_training import VOCABULARY
from llama_fn.training import optim
from llama_fn.training.schedule import warmup_cosine, warmup_linear


@dataclass(frozen=True)
class Plan:
    """All numbers that a training run depends on. A number that is None is derived from the others."""

    dim: int = 144
    """The model's width."""
    n_layers: int = 4
    """The number of layers."""
    n_heads: int | None = None
    """By default 6, or the next smaller number that divides the width into heads of an even width."""
    n_kv_heads: int | None = None
    """By default 2, or 1 for an odd number of heads."""
    hidden_dim: int | None = None
    """The feed-forward's hidden width; by default 16/9 of the width, rounded up to a multiple of 8."""
    vocab_size: int | None = None
    """By default 1024; fewer if the texts are too short for that, more if they have many different characters."""
    context: int = 256
    """Tokens that a row predicts."""
    steps: int | None = None
    """By default 4000. A resumed run keeps its number, or continues to this one."""
    batch: int = 32
    """Rows in each micro-batch."""
    micro_batches: int = 1
    """Micro-batches in each step. They are computed one after another to save memory."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for the matrices in the layers and AdamW for the rest."""
    learning_rate: float = 2e-3
    """The highest learning rate, which is reached after the warmup."""
    decay: Literal["cosine", "linear"] = "cosine"
    """The curve along which the learning rate falls after the warmup."""
    final_learning_rate: float = 0.0
    """The learning rate after the last step."""
    warmup: int | None = None
    """Steps until the highest learning rate; by default 100, or a quarter of all steps if that is less."""
    weight_decay: float = 0.01
    """The weight decay of matrices; norms have none."""
    clip: float = 1.0
    """The largest norm of the gradient; a larger one is scaled down to it."""
    stories: int = 200_000
    """The number of stories to train on if no texts are given."""
    seed: int = 0
    """The seed of the weights, of the stories, and of the order of the rows."""

    def filled(self) -> "Plan":
        """The plan with every None replaced by its default, except `vocab_size`, which depends on the texts."""
        kv = self.n_kv_heads or 1
        fits = (n for n in range(max(6, kv), 0, -1) if n % kv == 0 and self.dim % n == 0 and self.dim // n % 2 == 0)
        heads = next(fits, 6) if self.n_heads is None else self.n_heads
        steps = 4000 if self.steps is None else self.steps
        return dataclasses.replace(
            self, n_heads=heads, steps=steps,
            n_kv_heads=2 - heads % 2 if self.n_kv_heads is None else self.n_kv_heads,
            hidden_dim=8 * -(-self.dim * 2 // 9) if self.hidden_dim is None else self.hidden_dim,
            warmup=min(100, steps // 4) if self.warmup is None else self.warmup)

    def continued(self, before: dict[str, Any]) -> "Plan":
        """The plan with every None replaced by the number in ``before``, the manifest of a run that is resumed."""
        return dataclasses.replace(self, **{name: before[name] for name, value in vars(self).items()
                                            if value is None and name in before})

    def check(self) -> None:
        """Raise `ValueError` that names the first number out of its range."""
        least: dict[str, int] = dict.fromkeys(("dim", "context", "steps", "batch", "micro_batches", "stories"), 1)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, int | None) and value is not None:
                integer(field.name, value, least.get(field.name))
            elif (words := get_args(field.type)) and isinstance(words[0], str) and value not in words:
                raise ValueError(f"{field.name} must be one of {', '.join(words)}; got {value!r}")
        for name in ("learning_rate", "clip"):
            number(name, getattr(self, name), above=True)
        for name in ("final_learning_rate", "weight_decay"):
            number(name, getattr(self, name))

    def config(self) -> Config:
        """The model's `Config`. Raises `ValueError` for sizes that do not make a model."""
        plan, size = self.filled(), VOCABULARY if self.vocab_size is None else self.vocab_size
        assert plan.n_heads is not None and plan.n_kv_heads is not None and plan.hidden_dim is not None
        return Config(plan.dim, plan.n_layers, plan.n_heads, plan.n_kv_heads, size, plan.hidden_dim,
                      max_seq_len=plan.context)

    def schedule(self) -> optim.Schedule:
        """A learning rate with warmup and a decay."""
        plan = self.filled()
        assert plan.warmup is not None and plan.steps is not None
        curve = warmup_linear if plan.decay == "linear" else warmup_cosine
        return curve(plan.learning_rate, plan.warmup, plan.steps, plan.final_learning_rate)

    def make_optimizer(self) -> optim.Optimizer:
        """The optimizer, with weight decay on matrices, gradient clipping, and the learning rate of `schedule`."""
        make = optim.muon if self.optimizer == "muon" else optim.adamw
        return optim.chain(optim.clip_by_global_norm(self.clip),
                           make(self.schedule(), b1=0.9, b2=0.99, weight_decay=self.weight_decay, mask=optim.matrices))
