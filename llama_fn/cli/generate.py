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
from llama_fn.cli.on_mesh import Mesh, MeshPlan, on_mesh
from llama_fn.cli.options import Context, Dtype, MaxNewTokens, device_of, model_of, with_context
from llama_fn.generation.completion import stream
from llama_fn.generation.drafted import Speculation, speculate_stream
from llama_fn.generation.sampling import narrowing, sampler
from llama_fn.text import decode
from llama_fn.transforms.quantize import Bits


def generate(prompt: Annotated[str, tyro.conf.Positional] = "Once upon a time", *, model: str = "stories",
             adapter: Path | None = None, max_new_tokens: MaxNewTokens = None, context: Context = None,
             temperature: float = 0.8,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             repetition_penalty: float | None = None, greedy: bool = False, seed: int | None = None,
             stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (), draft: str | None = None, speculate: int = 4,
             dtype: Dtype = "stored", quantize: Bits | None = None, device: str = "auto",
             mesh: Mesh = None, mesh_plan: MeshPlan = None) -> None:
    """Print a prompt and the model's continuation of it, a piece at a time.

    The seed and the speed go to standard error, and with a draft model also how many of its tokens were accepted.
    Ctrl-C stops.

    Args:
        prompt: The beginning of the text. "-" reads it from standard input; "" lets the model begin.
        model: The embedded model "stories", or a folder with params.json, consolidated.00.pth and tokenizer.model.
        adapter: A folder with a LoRA adapter of the model (adapter_config.json and adapter_model.safetensors, as PEFT
            writes them).
        max_new_tokens: The most tokens to write; by default up to the end of the context.
        context: The most tokens of prompt and text together; by default as many as the model was trained for.
        temperature: Below 1, likely tokens become likelier; above 1, less so. 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens.
        top_p: Draw from the likeliest tokens that together have probability p.
        min_p: Draw from the tokens at least p times as likely as the likeliest.
        repetition_penalty: Above 1, make tokens that are in the text already less likely.
        greedy: Always take the likeliest token.
        seed: The same seed writes the same text; by default a random seed.
        stop: End before this string. The option may be given several times.
        draft: A smaller model with the same tokenizer, which drafts tokens for the model to check. The text stays the
            same, and it comes sooner if most drafted tokens are accepted.
        speculate: How many tokens the draft model proposes at a time.
        dtype: Compute in this dtype, or as the weights are stored.
        quantize: "int8" stores the matrices in 8 bits: half the memory of bfloat16, and nearly the same text. "int4"
            stores them in 4 bits, in a quarter of the memory.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
        mesh: The processes that torchrun started, such as "tp=2": each has a part of the model. The text is that of one
            device, up to rounding.
        mesh_plan: How the model is divided: "tensor" (over tp), "fsdp" (over dp), "replicated+tensor", "fsdp+tensor" or
            "replicated". By default over all axes of the mesh.
    """
    settings = (0.0 if greedy else temperature, top_k, top_p, min_p, repetition_penalty)
    sample, narrow = sampler(*settings), narrowing(*settings)
    with on_mesh(mesh, mesh_plan, device_of(device)) as world:
        seed, prompt = world.from_first(lambda: (secrets.randbelow(2**32) if seed is None else seed,
                                                 _standard_input() if prompt == "-" else prompt))
        key = random.key(seed)
        loaded = with_context(model_of(model, adapter, dtype, device, quantize, world), context)
        count, acceptance = 0, ""

        def counting_sample(*args: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return sample(*args)

        def counted(speculations: Iterator[tuple[str, Speculation]]) -> Iterator[str]:
            nonlocal count, acceptance
            for piece, so_far in speculations:
                count = len(so_far.tokens)
                acceptance = f"; {so_far.accepted} of {so_far.proposed} drafted tokens accepted"
                yield piece

        if draft is None:
            pieces = stream(loaded, prompt, key=key, max_new_tokens=max_new_tokens, sampler=counting_sample, stop=stop)
        else:
            draft_model = model_of(draft, None, dtype, device)
            pieces = counted(speculate_stream(loaded, draft_model, prompt, key=key, n=speculate,
                                              max_new_tokens=max_new_tokens, narrow=narrow, stop=stop))
        begin = time.perf_counter()
        try:
            print(prompt, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:  # this runs after Ctrl-C, too
            seconds = time.perf_counter() - begin
            print(flush=True)
            speed = f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens a second"
            print(f"[seed {seed}: {speed}{acceptance}]", file=sys.stderr)


def _standard_input() -> str:
    text = decode(sys.stdin.buffer.read(), "standard input").removesuffix("\n")  # echo adds a newline
    if not text.strip():
        raise ValueError("the prompt is empty: standard input holds no text")
    return text
