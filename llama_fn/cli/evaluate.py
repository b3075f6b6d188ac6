"""`llama-fn evaluate`: how close a model comes to the grammar of the stories."""

from typing import Annotated

import tyro
from tqdm import tqdm

from llama_fn.bench import stories
from llama_fn.checkpoint.load import check_tokenizer, load
from llama_fn.cli.options import Dtype, device_of, dtype_of


def evaluate(model: Annotated[str, tyro.conf.Positional] = "stories", *, count: int = 1000, seed: int = 0,
             batch: int = 50, dtype: Dtype = "stored", device: str = "auto") -> None:
    """Print the loss on new stories, the lowest possible loss on them, and how many sampled stories are derivable.

    A story is derivable if the grammar of the stories can generate it.

    Args:
        model: The embedded model "stories", or the folder of a model.
        count: How many stories to read, and how many to write (at temperature 1, with an empty prompt).
        seed: The seed of the stories and of the samples.
        batch: How many stories to read or write at a time.
        dtype: Compute in this dtype, or as the weights are stored.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count and batch must be at least 1, got {count} and {batch}")
    loaded = load(model, dtype=dtype_of(dtype), device=device_of(device))
    check_tokenizer(loaded)
    with tqdm(total=2 * count, unit="story") as bar:
        nats, floor, tokens, derivable = stories.evaluate(loaded, count, batch, seed, bar.update)
    print(f"loss       {nats / tokens:.4f} nats a token, on {count} stories")
    print(f"floor      {floor / tokens:.4f} nats a token, the entropy of the same stories")
    print(f"above it   {nats / floor - 1:.2%}")
    print(f"derivable  {derivable / count:.1%} of {count} stories sampled at temperature 1")
