"""How well a model has learned the stories, measured against the grammar that they are drawn from."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from llama_fn import random, stories
from llama_fn.checkpoint.load import Model
from llama_fn.generation.completion import text_completion
from llama_fn.training.loss import loss_sum


class Evaluation(NamedTuple):
    """The nats of the model and of the grammar for the same stories, their tokens, and how many samples are derivable.

    `grammar_nats` is the entropy of the stories: no model can have a lower loss on them. A sampled story is derivable
    if the grammar can generate it.
    """

    model_nats: float
    grammar_nats: float
    tokens: int
    derivable: int


def evaluate(model: Model, count: int, batch: int, seed: int, report: Callable[[int], object]) -> Evaluation:
    """Read `count` new stories and write as many at temperature 1, `batch` at a time.

    `report` is called with the number of stories that were read or written since its last call.
    """
    read, write = random.split(random.fold_in(random.key(seed), 1))  # these keys differ from a training run's
    texts = list(stories.stories(read, count))
    keys = random.split(write, count)
    nats, tokens, derivable = 0.0, 0, 0
    with torch.no_grad():
        for first in range(0, count, batch):
            rows = [model.tokenizer.encode(story.text, eos=True) for story in texts[first:first + batch]]
            longest = max(map(len, rows))
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
            total, number = loss_sum(model.params, *(x.to(model.params.norm.device) for x in (padded, mask)))
            nats, tokens = nats + float(total), tokens + int(number)
            report(len(rows))
        for first in range(0, count, batch):
            some = keys[first:first + batch]
            completions = text_completion(model, [""] * len(some), key=some)
            derivable += sum(stories.derivable(completion.text) for completion in completions)
            report(len(some))
    return Evaluation(nats, sum(story.bits for story in texts) * math.log(2), tokens, derivable)
