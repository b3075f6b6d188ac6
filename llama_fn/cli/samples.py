"""Texts that a model writes while it is trained."""

import warnings
from collections.abc import Iterator, Sequence

from llama_fn import random
from llama_fn.checkpoint.load import Model
from llama_fn.generation.completion import text_completion
from llama_fn.ranges import integer
from llama_fn.training.progress import Samples


def samples_of(every: int | None, prompts: Sequence[str], tokens: int, seed: int) -> Samples | None:
    """The samples of a run: a text of at most ``tokens`` tokens for each prompt, every ``every`` steps.

    None as ``every`` means no samples. A text depends on the model, the prompt, the seed and the step alone. If a
    prompt cannot be continued (it may be longer than the context), a warning says so and the training goes on. Raises
    `ValueError` for numbers below 1.
    """
    if every is None:
        return None
    every, tokens = integer("sample_every", every, 1), integer("sample_tokens", tokens, 1)

    def draw(model: Model, step: int) -> Iterator[dict]:
        keys = random.split(random.fold_in(random.key(seed), step), len(prompts))
        for prompt, key in zip(prompts, keys, strict=True):
            try:
                (text,) = text_completion(model, [prompt], key=key, max_new_tokens=tokens)
            except ValueError as error:
                warnings.warn(f"no sample for the prompt {prompt[:80]!r}: {error}", stacklevel=2)
            else:
                yield {"prompt": prompt, "sample": text.text}

    return Samples(every, draw)
