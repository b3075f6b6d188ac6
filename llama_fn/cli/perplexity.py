"""`llama-fn perplexity` and `llama-fn choose`: how likely a text is, or each of several options."""

from pathlib import Path
from typing import Annotated

import torch
import tyro

from llama_fn.checkpoint.load import check_tokenizer, load
from llama_fn.cli.options import Dtype, device_of, dtype_of
from llama_fn.cli.progress import late_bar
from llama_fn.generation.perplexity import Perplexity
from llama_fn.generation.perplexity import perplexity as predicted
from llama_fn.generation.scoring import score_options
from llama_fn.training.texts import read_texts


def perplexity(file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")], *, model: str = "stories",
               window: Annotated[int | None, tyro.conf.arg(aliases=["-c", "--context"])] = None,
               stride: int | None = None, dtype: Dtype = "stored",
               device: str = "auto") -> None:
    """Print how well a model predicts a text, in a sliding window: perplexity per token, and bits per byte.

    Args:
        file: A text file, a JSON or JSON-lines file (the "text" of each record), or a folder of such files.
        model: The embedded model "stories", or the folder of a model.
        window: The number of tokens in the window; by default the model's context.
        stride: How many tokens the window moves at a time; by default half a window. A shorter stride gives each token
            more context and takes longer.
        dtype: Compute in this dtype, or as the weights are stored.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """
    texts = list(read_texts(file))
    loaded = load(model, dtype=dtype_of(dtype), device=device_of(device))
    check_tokenizer(loaded)
    count = sum(len(loaded.tokenizer.encode(text, bos=False)) for text in texts)
    with torch.no_grad(), late_bar(total=count, unit="token") as bar:
        parts = [predicted(loaded, text, window, stride, lambda n: bar().update(n)) for text in texts]
    whole = Perplexity(*map(sum, zip(*parts, strict=True)))
    print(f"perplexity    {whole.perplexity:.4f}")
    print(f"bits a byte   {whole.bits_per_byte:.4f}")
    print(f"nats a token  {whole.nats / whole.tokens:.4f}")
    print(f"tokens        {whole.tokens:,} of {whole.bytes:,} bytes, in {len(texts)} text{'s' * (len(texts) != 1)}")


def choose(prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")],
           options: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OPTION ...")], *,
           model: str = "stories", dtype: Dtype = "stored", device: str = "auto") -> None:
    """Print how likely each option is as a continuation of a prompt, the likeliest first.

    The share is an option's probability among the given options. The bits a byte do not depend on the other options.
    They compare options of different lengths: the option with the fewest is the best.

    Args:
        prompt: The text before each option. It should end without a space, and each option should begin with one.
        options: One or more continuations.
        model: The embedded model "stories", or the folder of a model.
        dtype: Compute in this dtype, or as the weights are stored.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """
    loaded = load(model, dtype=dtype_of(dtype), device=device_of(device))
    scores = score_options(loaded, prompt, options)
    ratios = torch.tensor([score.log_ratio for score in scores], dtype=torch.float64)
    order, shares = ratios.argsort(descending=True, stable=True).tolist(), ratios.softmax(0).tolist()
    print("share    bits a byte  option")
    for i in order:
        print(f"{shares[i]:7.2%}  {scores[i].bits_per_byte:11.4f}  {options[i]}")
