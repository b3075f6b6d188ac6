"""A token on a mesh of this machine's processes, compiled and not, beside one device and beside paper.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/bench/mesh_decode.py [SHAPE] [ROUNDS]

The weights are random, in bfloat16, and divided by the plan `tensor`. Meanwhile "one device" is what every process does
by itself with all weights, at the same time as the others. Paper needs three figures of the machine: the speed of its
memory, from a compiled token of one device, and what an all-reduce of few and of many bytes takes. The last lines are
the medians of the seconds.
"""

import os
import statistics
import sys

import torch
import torch.distributed as dist

import llama_fn as lf
from llama_fn.bench.timing import interleave
from llama_fn.bench.work import SHAPES
from llama_fn.mesh.estimate import Decoding, decoding
from llama_fn.mesh.machine import LINKS, START, Machine

arguments = sys.argv[1:] + ["tinyllama", "10"][len(sys.argv) - 1:]
config, rounds = SHAPES[arguments[0]], int(arguments[1])
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
count, slots = int(os.environ["WORLD_SIZE"]), 64
mesh = lf.mesh.make_mesh({"tp": count})
whole = lf.init_params(lf.random.key(0), config, torch.bfloat16)
cache = lf.init_cache(config, (1,), max_len=slots, dtype=torch.bfloat16)


def token_of(params, cache, forward):
    """A function that puts a token through the model, always at the same place."""
    token = torch.ones(1, 1, dtype=torch.int64)

    def run() -> None:
        dist.barrier()
        forward(params, token, cache)
        dist.barrier()

    return run


def reducing(x):
    def run() -> None:
        dist.all_reduce(x)

    return run


parts, own = lf.mesh.shard((whole, cache), mesh, "tensor")
seconds = interleave({
    "one device": token_of(whole, cache, lf.forward),
    "one device, compiled": token_of(whole, cache, lf.jit_layers()),
    "tensor": token_of(parts, own, lf.forward),
    "tensor, compiled": token_of(parts, own, lf.jit_layers()),
    "few bytes": reducing(torch.zeros(1)), "many bytes": reducing(torch.zeros(2**22))}, rounds)
if dist.get_rank() == 0:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    few, many = medians.pop("few bytes"), medians.pop("many bytes")
    job, plan = Decoding(1, slots, torch.bfloat16), "tensor"
    fast = Machine(1e18, 1e15, 1.0, 1.0, 1.0, count)  # its memory has a speed of one byte a second
    read = decoding(config, fast, {"tp": 1}, plan, job).seconds["reading"]
    link = 2 * (count - 1) / count * 2**24 / (many - few) / LINKS
    here = Machine(1e18, 1e15, read / medians["one device, compiled"], link, 1.0, count,
                   (few - START) / (2 * (count - 1)))
    for name, each in medians.items():
        print(f"{name}: {1e3 * each:.1f} ms")
    paper = decoding(config, here, {"tp": count}, plan, job).time
    print(f"on paper: {1e3 * paper:.1f} ms; tensor, compiled, takes {medians['tensor, compiled'] / paper:.2f} of it")
