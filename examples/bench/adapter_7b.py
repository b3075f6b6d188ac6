"""Measure LoRA on a model of LLaMA 2 7B's shape, with int4 weights under it: seconds a step and peak memory.

    python examples/bench/adapter_7b.py [7b|1b] [TOKENS] [STEPS] [ROWS]

The weights are random. Each matrix is quantized when it is made, so that the model is never in memory as a whole. A step
computes each layer again in the backward (`remat`), so that it keeps only the input of each.
"""

import dataclasses
import json
import resource
import sys
import time

import torch

import llama_fn as lf
from llama_fn.training.finetune import adapter, begin, step_of
from llama_fn.transforms.quantize import quantized_leaf

SHAPES = {"7b": lf.LLAMA2_7B,
          "1b": dataclasses.replace(lf.LLAMA2_7B, dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632)}


def random_int4(config: lf.Config, key: torch.Tensor) -> lf.Params:
    """Random parameters: matrices in 4 bits, norms and embedding in bfloat16."""
    quantized, number = quantized_leaf("int4"), 0

    def leaf(path: str, weight) -> object:
        nonlocal number
        number += 1
        shape = tuple(weight.shape)
        if weight.std is None:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(number)  # torch's own numbers: ten times as fast as Threefry's
        return quantized(path, weight, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))

    return lf.tree.map_with_path(leaf, lf.abstract_params(config))


def peak() -> float:
    """The most memory that this process had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    name, *numbers = sys.argv[1:] or ["7b"]
    tokens, steps, rows = (*map(int, numbers), *(256, 2, 1)[len(numbers):])
    config = SHAPES[name]
    begun = time.perf_counter()
    params = random_int4(config, lf.random.key(0))
    held = sum(x.numel() * x.itemsize for x in lf.tree.leaves(params)) / 2**30
    print(f"{config.n_params:,} parameters in {held:.2f} GiB, made in {time.perf_counter() - begun:.0f} s; peak "
          f"{peak():.2f} GiB", flush=True)
    task = adapter(params, lf.lora.init(lf.random.key(1), params, rank=8, targets=("wq", "wv")))
    optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0), lf.optim.adamw(2e-4))
    state, step = begin(task, optimizer), step_of(task, optimizer, layer=lf.remat(lf.block))
    batch = lf.random.randint(lf.random.key(2), (1, rows, tokens + 1), 0, config.vocab_size, torch.int64)
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        trained, opt_state, metrics = step(state.params, state.opt_state, batch, batch >= 0, task.frozen)
        state = state._replace(params=trained, opt_state=opt_state)
        seconds.append(round(time.perf_counter() - begun, 2))
        print(f"loss {float(metrics.loss):.4f}, {seconds[-1]} s, peak {peak():.2f} GiB", flush=True)
    print(json.dumps({"shape": name, "rows": rows, "tokens": tokens, "rank": 8, "threads": torch.get_num_threads(),
                      "weights_gib": round(held, 2), "seconds": seconds, "peak_gib": round(peak(), 2)}))


if __name__ == "__main__":
    main()
