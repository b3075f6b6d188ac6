"""`Tuning`: all numbers that a fine-tuning depends on."""

import dataclasses
from dataclasses import dataclass

from llama_fn.ranges import integer, number
from llama_fn.training import optim
from llama_fn.training.schedule import warmup_cosine


@dataclass(frozen=True)
class Tuning:
    """All numbers that a fine-tuning depends on. A number that is None is derived from the others."""

    rank: int | None = None
    """Train a LoRA adapter of this rank. By default all weights are trained, or the given adapter."""
    targets: tuple[str, ...] = ("wq", "wv")
    """The weights that an adapter changes: of wq, wk, wv, wo, w_gate, w_up, w_down and output."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank; by default alpha is the rank."""
    dpo: bool = False
    """Learn from preferences, by direct preference optimization."""
    beta: float = 0.1
    """How strongly --dpo holds the model to what it was before."""
    epochs: float = 3.0
    """How often each example is learned, where the number of steps is not given."""
    steps: int | None = None
    """The number of steps; by default as many as the epochs take."""
    context: int | None = None
    """The most tokens that a row predicts; by default the context of the model."""
    batch: int = 8
    """Examples in each micro-batch."""
    micro_batches: int = 1
    """Micro-batches in each step. They are computed one after another to save memory."""
    learning_rate: float | None = None
    """The highest one, after the warmup; by default 2e-4 for an adapter, 2e-5 for all weights, a tenth with --dpo."""
    final_learning_rate: float = 0.0
    """The learning rate after the last step."""
    warmup: int | None = None
    """Steps until the highest learning rate; by default a tenth of all steps."""
    weight_decay: float = 0.0
    """AdamW's weight decay, which only matrices have."""
    clip: float = 1.0
    """The largest norm of the gradient; a larger one is scaled down to it."""
    seed: int = 0
    """The seed of a new adapter and of the order of the examples."""

    def filled(self, examples: int, context: int, adapter: bool) -> "Tuning":
        """The numbers with every None replaced by its default, except those of the adapter.

        ``examples`` is their number, ``context`` is that of the model, and ``adapter`` says whether one is trained.
        """
        size = self.batch * self.micro_batches
        steps = max(1, -(-round(self.epochs * examples) // size)) if self.steps is None else self.steps
        rate = (2e-4 if adapter else 2e-5) * (0.1 if self.dpo else 1)
        return dataclasses.replace(
            self, steps=steps, context=context if self.context is None else self.context,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            warmup=steps // 10 if self.warmup is None else self.warmup)

    def check(self) -> None:
        """Raise `ValueError` that names the first number out of its range."""
        for name in ("rank", "steps", "context", "batch", "micro_batches"):
            if (value := getattr(self, name)) is not None:
                integer(name, value, 1)
        for name in ("alpha", "learning_rate"):
            if (value := getattr(self, name)) is not None:
                number(name, value, above=True)
        for name in ("epochs", "clip", "beta"):
            number(name, getattr(self, name), above=True)
        for name in ("final_learning_rate", "weight_decay"):
            number(name, getattr(self, name))
        integer("seed", self.seed, 0)
        if self.warmup is not None:
            integer("warmup", self.warmup, 0)

    def optimizer(self) -> optim.Optimizer:
        """AdamW with weight decay on matrices, gradient clipping, and a learning rate with warmup and cosine decay."""
        assert self.learning_rate is not None and self.warmup is not None and self.steps is not None  # filled
        rate = warmup_cosine(self.learning_rate, self.warmup, self.steps, self.final_learning_rate)
        return optim.chain(optim.clip_by_global_norm(self.clip),
                           optim.adamw(rate, weight_decay=self.weight_decay, mask=optim.matrices))
