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
    """Tell a model's format, config, parameters, bytes and dtype, and all that is missing or odd.

    Only headers are read. Exit status 1 if something is wrong with the weights or the tokenizer, and 2 if a file cannot
    be read or its settings make no model.

    Args:
        model: The embedded model "stories", or the folder (of llama2.c also the file) of a model.
    """
    format, place = find(model)
    weights = open_weights(format, place)
    tensors = [entry for entry in weights.stored if not isinstance(entry.kind, str)]
    files = Counter(entry.file for entry in weights.stored)
    kinds = Counter(entry.kind for entry in tensors)
    size = sum(math.prod(entry.shape) * entry.kind.itemsize for entry in tensors)
    print(f"{'format':<16}{NAMES[format]}, {len(files)} file{'s' * (len(files) != 1)} of weights")
    config = weights.config
    for name, value in dataclasses.asdict(config).items():
        if value is not None:
            print(f"{name:<16}{value}")
    print(f"{'head_dim':<16}{config.head_dim}")
    print(f"{'parameters':<16}{config.n_params:,}" + (" (embedding and output are one matrix)" if weights.tied else ""))
    print(f"{'tensors':<16}{len(weights.stored)}, {size:,} bytes, "
          + ", ".join(spelled(kind) for kind, _ in kinds.most_common()))
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
