"""LLaMA 2 at its real size on a small machine: make a 7B model of random numbers in Meta's layout, open it, decode.

    python examples/seven_billion.py make FOLDER [SHARDS]     # 13.5 GB on disk; one shard's share of it in memory
    python examples/seven_billion.py open FOLDER [TOKENS]     # seconds to open, seconds a token, resident memory

A single file is mapped into memory and not copied: the system reads a page from disk when it is first used. Shards are
joined one weight at a time. In both cases there is never a second copy of all weights.
"""

import resource
import sys
import time
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

import llama_fn as lf
from llama_fn.checkpoint.atomic import replacing_folder
from llama_fn.checkpoint.load import find, open_weights
from llama_fn.checkpoint.meta import write_meta
from llama_fn.checkpoint.weights import Weights, params_of

config = lf.LLAMA2_7B
abstract = lf.tree.paths(lf.abstract_params(config))


def draw(path: str) -> torch.Tensor:
    weight, generator = abstract[path], torch.Generator().manual_seed(zlib.crc32(path.encode()))
    if weight.std is None:
        return torch.ones(weight.shape, dtype=torch.bfloat16)
    return torch.empty(weight.shape, dtype=torch.bfloat16).normal_(0, weight.std, generator=generator)


def memory() -> str:
    """Resident memory now: the process's own, and pages of files, which the system may drop at any time."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, file = (int(lines[name].split()[0]) / 2**20 for name in ("RssAnon", "RssFile"))
    return f"{own:.2f} GiB own, {file:.2f} GiB of files"


what, folder = sys.argv[1], Path(sys.argv[2])
number = int(sys.argv[3]) if len(sys.argv) > 3 else None
if what == "make":
    with (tqdm(total=2 * config.n_params, unit="B", unit_scale=True, desc="writing") as bar,
          replacing_folder(folder) as beside):
        write_meta(Weights(config, draw, torch.bfloat16, []), beside, number, bar.update)
else:
    begun = time.perf_counter()
    print(f"before           {memory()}")
    params = params_of(open_weights(*find(folder)).checked(folder))
    print(f"opened           {time.perf_counter() - begun:.2f} s; {memory()}")
    cache = lf.init_cache(config, max_len=128, dtype=torch.bfloat16)
    token, times = torch.tensor([1]), []
    with torch.no_grad():
        for _ in range(number or 8):
            begun = time.perf_counter()
            logits, cache = lf.forward(params, token, cache)
            token = logits[-1:].argmax(-1)
            times.append(time.perf_counter() - begun)
    print(f"first token      {times[0]:.2f} s; {memory()}")
    print(f"a token after    {sorted(times[1:])[len(times) // 2 - 1]:.2f} s, median of {len(times) - 1}")
    print(f"peak             {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB resident")
