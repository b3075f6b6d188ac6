"""LLaMA 2 at its real size on a small machine: make a 7B model of random numbers in Meta's layout, open it, decode.

    python examples/seven_billion.py make FOLDER [SHARDS]     # 13.5 GB on disk; one shard's share of it in memory
    python examples/seven_billion.py open FOLDER [TOKENS]     # seconds to open, seconds a token, resident memory
    torchrun --nproc-per-node 4 examples/seven_billion.py open FOLDER [TOKENS]      # each process reads its quarter

A single file is mapped into memory and not copied: the system reads a page from disk when it is first used. Shards are
joined one weight at a time. In both cases there is never a second copy of all weights.

Under `torchrun` the processes are a mesh of one axis, "tp", and no process ever holds more than its own parts and one
part more. "Own" memory is the process's anonymous memory (RssAnon, looked at every 10 ms for its peak). Mapped pages of
the file are not counted: the system may drop them at any time, and they are the same pages for all processes.
"""

import os
import resource
import sys
import threading
import time
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

import llama_fn as lf
from llama_fn.checkpoint.atomic import replacing_folder
from llama_fn.checkpoint.meta import write_meta
from llama_fn.checkpoint.weights import Weights

config = lf.LLAMA2_7B
abstract = lf.tree.paths(lf.abstract_params(config))


def draw(path: str) -> torch.Tensor:
    weight, generator = abstract[path], torch.Generator().manual_seed(zlib.crc32(path.encode()))
    if weight.std is None:
        return torch.ones(weight.shape, dtype=torch.bfloat16)
    return torch.empty(weight.shape, dtype=torch.bfloat16).normal_(0, weight.std, generator=generator)


def memory() -> str:
    """Resident memory now: the process's own, and pages of files, which the system may drop at any time."""
    own, file = resident()
    peak[0] = max(peak[0], own)
    return f"{own:.2f} GiB own, {file:.2f} GiB of files"


def resident() -> tuple[float, float]:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, file = (int(lines[name].split()[0]) / 2**20 for name in ("RssAnon", "RssFile"))
    return own, file


def watch() -> None:
    while not done.wait(0.01):
        peak[0] = max(peak[0], resident()[0])


what, folder, peak, done = sys.argv[1], Path(sys.argv[2]), [0.0], threading.Event()
number = int(sys.argv[3]) if len(sys.argv) > 3 else None
if what == "make":
    with (tqdm(total=2 * config.n_params, unit="B", unit_scale=True, desc="writing") as bar,
          replacing_folder(folder) as beside):
        write_meta(Weights(config, draw, torch.bfloat16, []), beside, number, bar.update)
else:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    who = f"rank {rank} of {size}: " if size > 1 else ""
    begun = time.perf_counter()
    print(f"{who}before           {memory()}")
    threading.Thread(target=watch, daemon=True).start()
    cache = lf.init_cache(config, max_len=128, dtype=torch.bfloat16)
    if size > 1:
        mesh = lf.mesh.make_mesh({"tp": size})
        params, cache = lf.load(folder, mesh=mesh).params, lf.mesh.shard(cache, mesh, "tensor")
    else:
        params = lf.load(folder).params
    print(f"{who}opened           {time.perf_counter() - begun:.2f} s; {memory()}")
    token, tokens, times = torch.tensor([1]), [], []
    with torch.no_grad():
        for _ in range(number or 8):
            begun = time.perf_counter()
            logits, cache = lf.forward(params, token, cache)
            token = logits[-1:].argmax(-1)
            tokens.append(int(token))
            times.append(time.perf_counter() - begun)
    print(f"{who}first token      {times[0]:.2f} s; {memory()}")
    if len(times) > 1:
        print(f"{who}a token after    {sorted(times[1:])[len(times) // 2 - 1]:.2f} s, median of {len(times) - 1}")
    print(f"{who}tokens           {tokens}")
    done.set()
    print(f"{who}peak             {peak[0]:.2f} GiB own; "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB resident")
