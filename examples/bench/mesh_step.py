"""The training step of one model on every process of this machine, beside PyTorch's own engines for modules.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/bench/mesh_step.py [SHAPE] [ROWS] [TOKENS] [ROUNDS]

Each process has ROWS rows of TOKENS tokens. The plans replicated and fsdp run in turn with the same model as
`torch.nn` modules under DistributedDataParallel and under FSDP2 (`fully_shard` of every layer), all compiled, with
AdamW and clipping. The last lines are the medians of the seconds, and the ratios of the rounds.
"""

import contextlib
import os
import statistics
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import llama_fn as lf
from llama_fn.bench.opacus import Transformer
from llama_fn.bench.timing import interleave, ratio
from llama_fn.bench.work import SHAPES
from llama_fn.training.jit_step import jit_step

arguments = sys.argv[1:] + ["small", "8", "128", "20"][len(sys.argv) - 1:]
shape, (rows, tokens, rounds) = arguments[0], map(int, arguments[1:])
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
lf.keep_memory()
sizes = {"dp": int(os.environ["WORLD_SIZE"])}
mesh = lf.mesh.make_mesh(sizes)
config = SHAPES[shape]
params = lf.init_params(lf.random.key(0), config)
whole = lf.random.randint(lf.random.key(1), (rows * sizes["dp"], tokens + 1), 0, config.vocab_size)
batch = lf.mesh.shard(whole, mesh, "replicated")


def ours(plan: str):
    """A step of this package."""
    optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0), lf.optim.adamw(1e-4))
    step, state = jit_step(optimizer), [lf.mesh.shard(params, mesh, plan)]
    state = [*state, optimizer.init(state[0])]
    micro, mask = batch[None], torch.ones_like(batch, dtype=torch.bool)[None]

    def run() -> None:
        *state[:], metrics = step(*state, micro, mask)
        float(metrics.loss)

    return run


def modules(engine: str):
    """A step of the same model as modules."""
    model: nn.Module = Transformer(config)
    if engine == "FSDP2":
        for layer in model.blocks:
            layer.compile(dynamic=False)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = torch.compile(DistributedDataParallel(model, gradient_as_bucket_view=True), dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=engine == "DDP")

    def run() -> None:
        optimizer.zero_grad()
        logits: Tensor = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().long())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return run


def together(work):
    """The work, begun and ended by all processes at the same time."""
    def run() -> None:
        dist.barrier()
        work()
        dist.barrier()

    return run


works = {"replicated": ours("replicated"), "DDP": modules("DDP"), "fsdp": ours("fsdp"), "FSDP2": modules("FSDP2")}
seconds = interleave({name: together(work) for name, work in works.items()}, rounds)
if dist.get_rank() == 0:
    for name, values in seconds.items():
        print(f"{name}: {1e3 * statistics.median(values):.1f} ms")
    for own, other in (("replicated", "DDP"), ("fsdp", "FSDP2")):
        print(f"{own} beside {other}: {ratio(seconds[own], seconds[other])}")
with contextlib.suppress(RuntimeError):
    dist.destroy_process_group()
