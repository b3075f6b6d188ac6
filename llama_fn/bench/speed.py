"""The measurements of `llama-fn bench decode|prefill|train|startup`: each beside the machine's own ceiling."""

import functools
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.bench.device import device_of
from llama_fn.bench.module_step import module_step
from llama_fn.bench.peers import gpt_fast, hugging_face, llama_cpp
from llama_fn.bench.timing import interleave, quartiles, ratio
from llama_fn.checkpoint.load import load
from llama_fn.compiled.layers import jit_layers
from llama_fn.config import LLAMA2_7B, Config
from llama_fn.model.cache import Cache, init_cache
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params, forward, head, trunk
from llama_fn.training import optim
from llama_fn.training.jit_step import jit_step
from llama_fn.transforms.quantize import quantized_leaf

SHAPES = {
    "tinyllama": Config(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000, hidden_dim=5632,
                        max_seq_len=2048),
    "llama2-7b": LLAMA2_7B,
    "small": Config(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, vocab_size=1024, hidden_dim=688, max_seq_len=512),
    "stories": None,
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16,
          "int8": torch.bfloat16, "int4": torch.bfloat16}
PEERS = {"hf": ("Hugging Face", hugging_face), "llama.cpp": ("llama.cpp", llama_cpp),
         "gpt-fast": ("gpt-fast", gpt_fast)}
READ = 2**29  # bytes that the memory's speed is measured with, on the CPU; of a GPU, eight times as many
# Tokens of a row that are measured together: a GPU is given them at once, as without anybody who reads them; and what
# another library's threads do when it has ended falls on the first of them.
CHAIN = {"cuda": 32, "cpu": 8}
Figures = dict[str, str]


class Work(NamedTuple):
    """What is measured: a model of random weights (or the shipped one), rows, tokens in the cache, its slots, where
    ("auto" takes a GPU if there is one), and beside whom.

    Of "int8" and "int4", the matrices are quantized and everything else is in bfloat16.
    """

    shape: Literal["tinyllama", "llama2-7b", "small", "stories"] = "tinyllama"
    dtype: Literal["bfloat16", "float32", "float16", "int8", "int4"] = "bfloat16"
    batch: int = 1
    context: int = 128
    max_len: int = 1024
    device: str = "auto"
    compare: tuple[Literal["hf", "llama.cpp", "gpt-fast", "module"], ...] = ()


def check(work: Work) -> None:
    """Raise `ValueError` for a work that cannot be."""
    if not 0 < work.context < work.max_len:
        raise ValueError(f"bench: a context must lie between 0 and max_len = {work.max_len}, got {work.context}")
    if work.batch < 1:
        raise ValueError(f"bench: a batch has at least one row, got {work.batch}")
    if "llama.cpp" in work.compare and device_of(work.device).type == "cuda":
        raise ValueError("bench: llama.cpp is measured on the CPU; use --device cpu")


def weights(work: Work) -> Params:
    """Random numbers of the shape, of a size at which nothing overflows; of "stories" its own."""
    dtype, device = DTYPES[work.dtype], device_of(work.device)
    if SHAPES[work.shape] is None:
        return load("stories", dtype=dtype, device=device,
                    quantize=work.dtype if work.dtype in ("int8", "int4") else None).params
    generator = torch.Generator(device).manual_seed(0)

    def one(path: str, weight: Weight) -> Any:
        x = torch.empty(weight.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        return quantized_leaf(work.dtype)(path, weight, x) if work.dtype in ("int8", "int4") else x

    return tree.map_with_path(one, abstract_params(SHAPES[work.shape]))


def matrix_numbers(config: Config) -> int:
    """How many weights every token is multiplied with."""
    shapes = tree.paths(abstract_params(config)).items()
    return sum(math.prod(x.shape) for path, x in shapes if x.std is not None and path != "embedding")


def decode(work: Work, rounds: int) -> Figures:
    """One token a row, the weights read once: the share of the memory's speed."""
    params, dtype, device = weights(work), DTYPES[work.dtype], device_of(work.device)
    count = CHAIN.get(device.type, CHAIN["cpu"])
    if work.context + count > work.max_len:
        raise ValueError(f"bench: {count} tokens are measured together, and max_len = {work.max_len} has no room for "
                         f"them after {work.context}")
    run = jit_layers(_greedy)
    state = [torch.zeros((work.batch, 1), dtype=torch.int64, device=device), _filled(params.config, work, dtype)]
    start = state[1].length

    def step() -> None:
        for _ in range(count):
            state[:] = run(params, *state)
        state[1] = state[1]._replace(length=start)  # the same work again

    def several(one: Callable[[], Any]) -> Callable[[], None]:
        def all_of_them() -> None:
            for _ in range(count):
                one()

        return all_of_them

    name, memory, size = memory_speed(device)
    works: dict[str, Callable] = {name: memory, "llama_fn": step}
    for peer in work.compare:
        works[PEERS[peer][0]] = several(PEERS[peer][1](params, work.batch, 1, work.context, work.max_len))
    with torch.no_grad():
        times = {what: [t / (1 if what == name else count) for t in seconds] for what, seconds in
                 interleave(_waited_for(works, device), rounds, f"decode, {work.shape}").items()}
    kv = sum(x.nbytes for x in state[1].k + state[1].v) * (work.context + (count + 1) / 2) / work.max_len
    needed = sum(x.nbytes for x in tree.leaves(params)) - params.embedding.nbytes + kv
    floor = [seconds * needed / size for seconds in times[name]]
    figures = _times(times, work.batch) | {"bytes a step, GB": f"{needed / 1e9:.3f}"}
    figures[f"{name}, GB/s"] = _spread([size / t / 1e9 for t in times.pop(name)])
    figures["llama_fn, GB/s"] = _spread([needed / t / 1e9 for t in times["llama_fn"]])
    figures["share of the memory's speed"] = str(ratio(floor, times["llama_fn"]))
    return figures | _compared(times)


def _greedy(params: Params, tokens: Tensor, cache: Cache, **parts: Callable) -> tuple[Tensor, Cache]:
    logits, cache = forward(params, tokens, cache, **parts)
    return logits.float().argmax(-1), cache  # of bfloat16, torch takes four times as long


def memory_speed(device: torch.device) -> tuple[str, Callable[[], Any], int]:
    """What measures it, and how many bytes that moves: of a GPU a copy, read and written; of the CPU a sum, since it
    reads faster than it copies, and integers, since it sums them faster than floats."""
    if device.type == "cuda":
        old = torch.ones(8 * READ, dtype=torch.uint8, device=device)
        new = torch.empty_like(old)
        return "copying memory", lambda: new.copy_(old), 2 * old.nbytes
    numbers = torch.ones(READ // 8, dtype=torch.int64)
    return "reading memory", numbers.sum, READ


def prefill(work: Work, rounds: int) -> Figures:
    """`context` tokens at once into an empty cache, and the logits after the last: the share of the speed of this
    machine's matrix products, in the weights' dtype or in float32, whichever is faster.
    """
    params, dtype, device = weights(work), DTYPES[work.dtype], device_of(work.device)
    config = params.config
    tokens = torch.arange(work.batch * work.context, device=device).reshape(work.batch, -1) % config.vocab_size
    state = [init_cache(config, (work.batch,), max_len=work.max_len, dtype=dtype, device=device)]

    run = jit_layers(trunk)

    def step() -> None:
        x, cache = run(params, tokens, state[0])
        head(params.norm, params.output, x[:, -1:], config.norm_eps)
        state[0] = cache._replace(length=torch.zeros_like(cache.length))

    a, b = _fastest(tokens.numel(), config, dtype, device)
    works: dict[str, Callable] = {"llama_fn": step, "a matrix product": lambda: torch.nn.functional.linear(a, b)}
    for name in work.compare:
        works[PEERS[name][0]] = PEERS[name][1](params, work.batch, work.context, 0, work.max_len)
    with torch.no_grad():
        times = interleave(_waited_for(works, device), rounds, f"prefill, {work.shape}")
    matrices = matrix_numbers(params.config) - params.output.shape[0] * params.output.shape[1]
    products = times.pop("a matrix product")
    floor = [seconds * matrices / b.numel() for seconds in products]
    figures = _times(times, tokens.numel())
    figures["a matrix product, GFLOP/s"] = _spread([2 * a.shape[0] * b.numel() / t / 1e9 for t in products])
    return figures | {"share of the products' speed": str(ratio(floor, times["llama_fn"]))} | _compared(times)


def train(work: Work, rounds: int) -> Figures:
    """A step of AdamW on `batch` rows of `context` tokens, compiled: the share of its products' speed."""
    params, dtype, device = weights(work), DTYPES[work.dtype], device_of(work.device)
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-4))
    step, state = jit_step(optimizer), [params, optimizer.init(params)]
    tokens = torch.arange(work.batch * (work.context + 1), device=device).reshape(1, work.batch, -1)
    tokens %= params.config.vocab_size
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def run() -> None:
        state[:] = step(*state, tokens, mask)[:2]

    rows, config = work.batch * work.context, params.config
    a, b = _fastest(rows, config, dtype, device)
    works: dict[str, Callable] = {"llama_fn": run, "a matrix product": lambda: torch.nn.functional.linear(a, b)}
    if work.compare:
        works["a module"] = module_step(params, tokens[0])
    times = interleave(_waited_for(works, device), rounds, "train")
    matrices = matrix_numbers(params.config)
    products = times.pop("a matrix product")
    floor = [3 * seconds * matrices / b.numel() for seconds in products]  # forward, and backward twice
    figures = _times(times, rows)
    figures["a matrix product, GFLOP/s"] = _spread([2 * rows * b.numel() / t / 1e9 for t in products])
    return figures | {"share of the products' speed": str(ratio(floor, times["llama_fn"]))} | _compared(times)


def startup(work: Work, rounds: int) -> Figures:
    """Seconds of a new process to its first token: with an empty cache of compilations, then with it; eager."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, compiled in (("compiled, nothing cached", 1), ("compiled, cached", 1), ("eager", 0)):
            program = ("from llama_fn.cli import bench_speed as b; "
                       f"print(*b.first_token(b.Work(*{tuple(work)!r}), {compiled}))")
            begun = time.time()
            done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TMPDIR": folder})
            there, made = map(float, done.stdout.split())
            figures[f"{name}: first token, s"] = f"{there - begun - made:.1f}"
    return figures | {"(without the making of random weights)": ""}


def first_token(work: Work, compiled: int) -> tuple[float, float]:
    """Compute one token in this process: the time when it is there, and the seconds that the weights took to make."""
    begun = time.perf_counter()
    params = weights(work)
    made = time.perf_counter() - begun
    cache = _filled(params.config, work, DTYPES[work.dtype])
    run = jit_layers() if compiled else forward
    with torch.no_grad():
        logits, _ = run(params, torch.zeros((work.batch, 1), dtype=torch.int64, device=params.norm.device), cache)
        logits.argmax(-1).tolist()
    return time.time(), made


def _fastest(rows: int, config: Config, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two factors of a product of this size, in the dtype or in float32, whichever is faster."""
    pairs = [[torch.ones(n, config.dim, dtype=kind, device=device) for n in (rows, config.hidden_dim)]
             for kind in {dtype, torch.float32}]
    works = {str(i): functools.partial(torch.nn.functional.linear, *pair) for i, pair in enumerate(pairs)}
    seconds = interleave(_waited_for(works, device), 3, "products")
    return pairs[min(range(len(pairs)), key=lambda i: min(seconds[str(i)]))]


def _waited_for(works: dict[str, Callable], device: torch.device) -> dict[str, Callable]:
    """The works, each until the GPU has done it."""
    if device.type != "cuda":
        return works
    return {name: lambda work=work: (work(), torch.cuda.synchronize(device)) for name, work in works.items()}


def _filled(config: Config, work: Work, dtype: torch.dtype) -> Cache:
    cache = init_cache(config, (work.batch,), max_len=work.max_len, dtype=dtype, device=device_of(work.device))
    return cache._replace(length=torch.full_like(cache.length, work.context))


def _spread(values: list[float]) -> str:
    low, median, high = quartiles(values)
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


def _times(times: dict[str, list[float]], tokens: int) -> Figures:
    named = {name: times[name] for name in ("llama_fn", *(name for name, _ in PEERS.values())) if name in times}
    figures = {f"{name}, ms": _spread([1e3 * t for t in seconds]) for name, seconds in named.items()}
    figures |= {f"{name}, tokens a second": _spread([tokens / t for t in seconds]) for name, seconds in named.items()}
    figures["peak resident memory, GiB"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}"
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        figures["peak memory of the GPU, GiB"] = f"{peak / 2**30:.2f}"
    return figures


def _compared(times: dict[str, list[float]]) -> Figures:
    others = [name for name in times if name != "llama_fn"]
    return {f"llama_fn's time, of {name}'s": str(ratio(times["llama_fn"], times[name])) for name in others}


SPEED: dict[str, Callable[[Work, int], Figures]] = {
    "decode": decode, "prefill": prefill, "train": train, "startup": startup}
