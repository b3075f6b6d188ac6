"""`llama-fn evaluate`: how close a model comes to the grammar of the stories."""

import math
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from llama_fn import random, stories
from llama_fn.checkpoint.load import check_tokenizer, load
from llama_fn.cli.options import Dtype, device_of, dtype_of
from llama_fn.generation.completion import text_completion
from llama_fn.training.loss import loss_sum


def evaluate(model: Annotated[str, tyro.conf.Positional] = "stories", *, count: int = 1000, seed: int = 0,
             batch: int = 50, dtype: Dtype = "stored", device: str = "auto") -> None:
    """Tell the loss on new stories beside the lowest possible, and the share of the model's own that are derivable.

    Args:
        model: The embedded model "stories", or the folder of a model.
        count: How many stories to read, and how many to write (at temperature 1, from nothing).
        seed: Of the stories and of the keys.
        batch: Stories at a time.
        dtype: Compute in this dtype, or as the weights are stored.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count and batch must be at least 1, got {count} and {batch}")
    loaded = load(model, dtype=dtype_of(dtype), device=device_of(device))
    check_tokenizer(loaded)
    read, write = random.split(random.fold_in(random.key(seed), 1))  # other keys than a training run's
    told = list(stories.stories(read, count))
    keys = random.split(write, count)

    nats, tokens, derivable = 0.0, 0, 0
    with torch.no_grad(), tqdm(total=2 * count, unit="story") as bar:
        for first in range(0, count, batch):
            rows = [loaded.tokenizer.encode(story.text, eos=True) for story in told[first:first + batch]]
            longest = max(map(len, rows))
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            counts = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
            total, number = loss_sum(loaded.params, *(x.to(loaded.params.norm.device) for x in (padded, counts)))
            nats, tokens = nats + float(total), tokens + int(number)
            bar.update(len(rows))
        for first in range(0, count, batch):
            some = keys[first:first + batch]
            completions = text_completion(loaded, [""] * len(some), key=some)
            derivable += sum(stories.derivable(completion.text) for completion in completions)
            bar.update(len(some))

    floor = sum(story.bits for story in told) * math.log(2)
    print(f"loss       {nats / tokens:.4f} nats a token, on {count} stories")
    print(f"floor      {floor / tokens:.4f} nats a token, the entropy of the same stories")
    print(f"above it   {nats / floor - 1:.2%}")
    print(f"derivable  {derivable / count:.1%} of {count} stories sampled at temperature 1")
