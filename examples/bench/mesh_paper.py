"""A training step on a mesh of this machine's processes, beside what `llama-fn plan` expects of it on paper.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/bench/mesh_paper.py [SHAPE] [ROWS] [TOKENS] [ROUNDS]

Paper needs two figures of the machine: the speed of products, from a step of one device, and that of the links, from
all-reduces of few and of many bytes. Plans and the measurements of the machine take turns. The last lines are the
medians of the measured seconds and of their ratios to paper.
"""

import os
import statistics
import sys

import torch
import torch.distributed as dist

import llama_fn as lf
from llama_fn.bench.timing import interleave
from llama_fn.bench.work import SHAPES
from llama_fn.mesh.estimate import Training, training
from llama_fn.mesh.machine import LINKS, START, Machine
from llama_fn.training.jit_step import jit_step

arguments = sys.argv[1:] + ["small", "8", "128", "10"][len(sys.argv) - 1:]
config, (rows, tokens, rounds) = SHAPES[arguments[0]], map(int, arguments[1:])
torch.set_num_threads(1)
lf.keep_memory()
count = int(os.environ["WORLD_SIZE"])
meshes = {"replicated": {"dp": count}, "fsdp": {"dp": count}, "tensor": {"tp": count}}
params = lf.init_params(lf.random.key(0), config)
batch = lf.random.randint(lf.random.key(1), (rows, tokens + 1), 0, config.vocab_size)
job = Training(rows, tokens + 1, torch.float32, torch.float32)


def step_of(params, batch):
    """A compiled training step, as a function that runs it."""
    optimizer = lf.optim.adamw(1e-4)
    step, state = jit_step(optimizer), [params, optimizer.init(params)]
    mask = torch.ones_like(batch, dtype=torch.bool)[None]

    def run() -> None:
        *state[:], metrics = step(*state, batch[None], mask)
        float(metrics.loss)

    return run


def divided(plan: str):
    """The step by a plan."""
    mesh = lf.mesh.make_mesh(meshes[plan])
    return step_of(*lf.mesh.shard((params, batch), mesh, plan))


def together(work):
    """The work, begun and ended by all processes at the same time."""
    def run() -> None:
        dist.barrier()
        work()
        dist.barrier()

    return run


few, many = torch.zeros(1), torch.zeros(2**22)
works = {"one device": step_of(lf.tree.map(torch.clone, params), batch), "few bytes": lambda: dist.all_reduce(few),
         "many bytes": lambda: dist.all_reduce(many), **{plan: divided(plan) for plan in meshes}}
seconds = interleave({name: together(work) for name, work in works.items()}, rounds)


def machine(one: float, few: float, many: float) -> Machine:
    """This machine, by the seconds of a step of one device and of two all-reduces."""
    alone = training(config, Machine(1.0, 1e15, 1.0, 1.0, 1.0), {"dp": 1}, "replicated", job)
    steps, sent = 2 * (count - 1), 2 * (count - 1) / count * 2**24
    return Machine(alone.seconds["products"] / one, 1e15, 1.0, sent / (many - few) / LINKS, 1.0, count,
                   (few - START) / steps)


if dist.get_rank() == 0:
    figures = zip(*(seconds[name] for name in ("one device", "few bytes", "many bytes")), strict=True)
    paper = [{plan: training(config, machine(*these), meshes[plan], plan, job).time for plan in meshes}
             for these in figures]
    for plan in meshes:
        ratio = statistics.median(own / on_paper[plan] for own, on_paper in zip(seconds[plan], paper, strict=True))
        print(f"{plan}: {1e3 * statistics.median(seconds[plan]):.1f} ms, {ratio:.2f} of what paper says")
    print(f"one device: {1e3 * statistics.median(seconds['one device']):.1f} ms")
dist.destroy_process_group()
