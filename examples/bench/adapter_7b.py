"""Measure LoRA on a model of LLaMA 2 7B's shape, with int4 weights under it: seconds a step and peak memory.

    python examples/bench/adapter_7b.py [7b|1b] [TOKENS] [STEPS] [ROWS]

The weights are random. A step computes each layer again in the backward (`remat`), so that it keeps only the input of
each layer, and no more than one layer's weights are float32 at a time.
"""

import dataclasses
import json
import math
import resource
import sys
import time

import torch

import llama_fn as lf
from llama_fn.ops.quantized import GROUP, Grouped
from llama_fn.training.finetune import adapter, begin, step_of

SHAPES = {"7b": lf.LLAMA2_7B,
          "1b": dataclasses.replace(lf.LLAMA2_7B, dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632)}


def random_int4(config: lf.Config) -> lf.Params:
    """Random parameters: matrices of random 4-bit integers, and norms and embedding in float32.

    A processor without bfloat16 products multiplies float32 several times as fast.
    """
    def leaf(path: str, weight) -> object:
        if weight.std is None:
            return torch.ones(weight.shape)
        if path == "embedding":
            return torch.randn(weight.shape) * 0.02
        *outer, last = weight.shape
        values = torch.randint(0, 256, (*outer, last // 2), dtype=torch.uint8)
        rows, inputs = weight.shape[:len(weight.outer)], math.prod(weight.inner)
        step_and_minimum = torch.tensor([0.004, -0.03], dtype=torch.bfloat16)
        return Grouped(values, step_and_minimum.expand(*rows, -(-inputs // GROUP), 2).contiguous())

    return lf.tree.map_with_path(leaf, lf.abstract_params(config))


def peak() -> float:
    """The most memory that this process had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    lf.keep_memory()
    name, *numbers = sys.argv[1:] or ["7b"]
    tokens, steps, rows = (*map(int, numbers), *(256, 2, 1)[len(numbers):])
    config = SHAPES[name]
    begun = time.perf_counter()
    params = random_int4(config)
    held = sum(x.numel() * x.itemsize for x in lf.tree.leaves(params)) / 2**30
    print(f"{config.n_params:,} parameters in {held:.2f} GiB, made in {time.perf_counter() - begun:.0f} s; peak "
          f"{peak():.2f} GiB", flush=True)
    task = adapter(params, lf.lora.init(lf.random.key(1), params, rank=8, targets=("wq", "wv")))
    optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(1.0), lf.optim.adamw(2e-4))
    state, step = begin(task, optimizer), step_of(task, optimizer, layer=lf.remat(lf.block))
    batch = lf.random.randint(lf.random.key(2), (1, rows, tokens + 1), 0, config.vocab_size, torch.int64)
    seconds, of_processor = [], []
    for _ in range(steps):
        begun, used = time.perf_counter(), time.process_time()
        trained, opt_state, metrics = step(state.params, state.opt_state, batch, batch >= 0, task.frozen)
        state = state._replace(params=trained, opt_state=opt_state)
        seconds.append(round(time.perf_counter() - begun, 1))
        of_processor.append(round(time.process_time() - used, 1))
        print(f"loss {float(metrics.loss):.4f}, {seconds[-1]} s ({of_processor[-1]} of a processor), peak {peak():.2f} "
              "GiB", flush=True)
    print(json.dumps({"shape": name, "rows": rows, "tokens": tokens, "rank": 8, "threads": torch.get_num_threads(),
                      "weights_gib": round(held, 2), "seconds": seconds,
                      "processor_seconds": of_processor, "peak_gib": round(peak(), 2)}))


if __name__ == "__main__":
    main()
