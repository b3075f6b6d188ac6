"""`llama-fn inspect`: what is in a model's folder, without loading it."""

import dataclasses
import math
import sys
from collections import Counter
from typing import Annotated

import tyro

from llama_fn.checkpoint.load import find, open_tokenizer, open_weights
from llama_fn.checkpoint.weights import spelled

NAMES = {"meta": "Meta's", "hf": "Hugging Face's", "llama2c": "llama2.c's"}


def inspect(model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = "stories") -> None:
    """Print a model's format, config, parameters, bytes and dtype, and everything that is missing or odd.

    Only headers are read. The exit status is 1 if something is wrong with the weights or the tokenizer, and 2 if a file
    cannot be read or its settings describe no model.

    Args:
        model: The embedded model "stories", or the folder of a model. For llama2.c also its file.
    """
    format, place = find(model)
    weights = open_weights(format, place)
    tensors = [(entry.shape, entry.kind) for entry in weights.stored if not isinstance(entry.kind, str)]
    files = Counter(entry.file for entry in weights.stored)
    dtypes = Counter(dtype for _, dtype in tensors)
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)
    print(f"{'format':<16}{NAMES[format]}, {len(files)} file{'s' * (len(files) != 1)} of weights")
    config = weights.config
    for name, value in dataclasses.asdict(config).items():
        if value is not None:
            print(f"{name:<16}{value}")
    print(f"{'head_dim':<16}{config.head_dim}")
    print(f"{'parameters':<16}{config.n_params:,}" + (" (embedding and output are one matrix)" if weights.tied else ""))
    print(f"{'tensors':<16}{len(weights.stored)}, {size:,} bytes, "
          + ", ".join(spelled(dtype) for dtype, _ in dtypes.most_common()))
    if weights.bits:
        print(f"{'quantized':<16}{weights.bits}, all matrices but the embedding")
    problems = list(weights.problems)
    try:
        tokenizer = open_tokenizer(place, weights)
        if tokenizer is None:
            print(f"{'tokenizer':<16}none")
        else:
            pieces, added = tokenizer.processor.vocab_size(), [name for _, name in tokenizer.added if name]
            print(f"{'tokenizer':<16}{pieces} tokens" + (f" and {len(added)} added" if added else ""))
    except (ValueError, OSError) as error:
        problems.append(str(error))
    for note in weights.notes:
        print(f"odd: {note}")
    for problem in problems:
        print(f"wrong: {problem}")
    if problems:
        sys.exit(1)
