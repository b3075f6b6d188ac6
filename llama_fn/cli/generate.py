"""`llama-fn generate`: complete a prompt on the terminal."""

import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from llama_fn import random
from llama_fn.cli.options import Context, Dtype, MaxNewTokens, model_of, within
from llama_fn.generation.completion import stream
from llama_fn.generation.drafted import speculate_stream
from llama_fn.generation.sampling import narrowing, sampler
from llama_fn.text import decode
from llama_fn.transforms.quantize import Bits


def generate(prompt: Annotated[str, tyro.conf.Positional] = "Once upon a time", *, model: str = "stories",
             adapter: Path | None = None, max_new_tokens: MaxNewTokens = None, context: Context = None,
             temperature: float = 0.8,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             repetition_penalty: float | None = None, greedy: bool = False, seed: int | None = None,
             stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (), draft: str | None = None, speculate: int = 4,
             dtype: Dtype = "stored", quantize: Bits | None = None, device: str = "auto") -> None:
    """Write a prompt and what the model makes of it to standard output, a piece at a time.

    The seed and the speed (and, with a draft, how much of it the model accepted) go to standard error. Ctrl-C stops.

    Args:
        prompt: The beginning of the text; "-" reads it from standard input, "" leaves everything to the model.
        model: The embedded model "stories", or a folder with params.json, consolidated.00.pth and tokenizer.model.
        adapter: A folder with a LoRA adapter of the model (adapter_config.json and adapter_model.safetensors, as PEFT
            writes them).
        max_new_tokens: The most tokens to write; by default up to the end of the context.
        context: The most tokens of prompt and text together; by default as many as the model was trained for.
        temperature: Below 1 likelier, above 1 wilder; 0 is greedy.
        top_k: Draw from the k likeliest tokens.
        top_p: Draw from the likeliest tokens that together have probability p.
        min_p: Draw from the tokens at least p times as likely as the likeliest.
        repetition_penalty: Above 1, make what is there already less likely.
        greedy: Always take the likeliest token.
        seed: The same seed writes the same text; by default another one every time.
        stop: End before this string; may be given several times.
        draft: A smaller model with the same tokenizer that drafts for the model to check: what may come is the same,
            and it comes sooner where most of the draft is accepted.
        speculate: How many tokens to draft at a time.
        dtype: Compute in this dtype, or as the weights are stored.
        quantize: "int8" keeps the matrices in 8 bits: half the memory of bfloat16, and nearly the same text; "int4"
            in 4 bits, a quarter of it.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """
    settings = (0.0 if greedy else temperature, top_k, top_p, min_p, repetition_penalty)
    sample, narrow = sampler(*settings), narrowing(*settings)
    seed = secrets.randbelow(2**32) if seed is None else seed
    key = random.key(seed)
    if prompt == "-":
        prompt = _standard_input()
    loaded = within(model_of(model, adapter, dtype, device, quantize), context)
    drafting = None if draft is None else model_of(draft, None, dtype, device)
    drawn, acceptance = 0, ""

    def counted(*args: Tensor) -> Tensor:
        nonlocal drawn
        drawn += 1
        return sample(*args)

    def speculated() -> Iterator[str]:
        nonlocal drawn, acceptance
        for piece, told in drafted:
            drawn = len(told.tokens)
            acceptance = f"; {told.accepted} of {told.proposed} drafted tokens accepted"
            yield piece

    if drafting is None:
        pieces = stream(loaded, prompt, key=key, max_new_tokens=max_new_tokens, sampler=counted, stop=stop)
    else:
        drafted = speculate_stream(loaded, drafting, prompt, key=key, n=speculate, max_new_tokens=max_new_tokens,
                                   narrow=narrow, stop=stop)
        pieces = speculated()
    begun = time.perf_counter()
    try:
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:  # after Ctrl-C, too
        seconds = time.perf_counter() - begun
        print(flush=True)
        print(f"[seed {seed}: {drawn} tokens in {seconds:.2f} s, {drawn / seconds:.0f} tokens a second{acceptance}]",
              file=sys.stderr)


def _standard_input() -> str:
    text = decode(sys.stdin.buffer.read(), "standard input").removesuffix("\n")  # echo's newline is not of the text
    if not text.strip():
        raise ValueError("the prompt is empty: nothing came on standard input")
    return text
