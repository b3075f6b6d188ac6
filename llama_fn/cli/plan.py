"""`llama-fn plan`: on paper, how a model is best divided over devices."""

from itertools import islice
from typing import Literal

import torch

from llama_fn.checkpoint.load import find, open_weights
from llama_fn.config import LLAMA2_7B, LLAMA2_13B, LLAMA2_70B
from llama_fn.mesh.estimate import (
    Decoding,
    Estimate,
    Training,
    best,
    enough,
    estimates,
    fits,
    meshes,
    obstacle,
)
from llama_fn.mesh.machine import GPUS, PCIE, PCIE_SPEED, USABLE, Machine
from llama_fn.ranges import integer, number

KNOWN = {"7b": LLAMA2_7B, "13b": LLAMA2_13B, "70b": LLAMA2_70B}
Half = Literal["bfloat16", "float16"]


def plan(*, model: str = "7b", devices: int = 8, gpu: Literal["h100", "h200", "a100"] = "h100", batch: int = 64,
         context: int | None = None, rows: int = 8, dtype: Half = "bfloat16",
         param_dtype: Literal["float32", "bfloat16", "float16"] = "float32", tflops: float | None = None,
         memory: float | None = None, bandwidth: float | None = None, link: str = "nvlink",
         network: float | None = None, host: int = 8) -> None:
    """Print what each plan on each mesh needs, training and decoding, and which to choose. Nothing is run.

    For each plan that divides the model evenly: a device's memory, the bytes that it sends in a step, and the expected
    time. Training is by AdamW, in as many micro-batches and with such recomputation (remat) as is fastest. Times are of
    half the GPU's peak, 85 % of its memory's speed and 80 % of its links', and sending does not overlap.

    Args:
        model: "7b", "13b" or "70b", the embedded model "stories", or the folder of a model.
        devices: The number of GPUs.
        gpu: Their kind.
        batch: The rows of a training step, on all devices together.
        context: The tokens of a row, in training and in a full cache; by default the model's context.
        rows: The rows that are decoded at once, on all devices together.
        dtype: The dtype of products, and of the weights in decoding.
        param_dtype: The dtype of the parameters in training.
        tflops: The peak speed of products, instead of the GPU's, in TFLOP/s.
        memory: The memory of a device in GB, instead of the GPU's.
        bandwidth: The speed of that memory in GB/s.
        link: The link within a host: "nvlink", "pcie", or its speed in GB/s, one way.
        network: The speed of each device's link to other hosts in GB/s, one way; by default that of InfiniBand.
        host: The devices in a host.
    """
    config = KNOWN[model] if model in KNOWN else open_weights(*find(model)).config
    machine = _machine(gpu, tflops, memory, bandwidth, link, network, host)
    devices = integer("--devices", devices, 1)
    context = config.max_seq_len if context is None else integer("--context", context, 2)
    batch, rows, computed = integer("--batch", batch, 1), integer("--rows", rows, 1), getattr(torch, dtype)
    print(f"{model}, {config.n_params:,} parameters, on {devices} x {gpu}: {machine.flops / 1e12:.4g} TFLOP/s, "
          f"{machine.memory / 1e9:.4g} GB, {machine.bandwidth / 1e9:.4g} GB/s; links of {machine.link / 1e9:.4g} GB/s "
          f"and {machine.network / 1e9:.4g} GB/s between hosts of {machine.host}")
    for title, job in (
            (f"train: {batch} rows of {context} tokens; parameters in {param_dtype}, products in {dtype}",
             Training(batch, context, getattr(torch, param_dtype), computed)),
            (f"decode: a token for each of {rows} rows, with {context} in the cache; {dtype}",
             Decoding(rows, context, computed))):
        found = estimates(config, machine, devices, job)
        chosen = best(found, machine)
        print(f"\n{title}")
        if not found:
            print("no plan divides this model and these rows evenly")
            for name, mesh in islice(meshes(devices), 3):
                print(f"  {name}: {obstacle(config, mesh, name, job)}")
            continue
        print(f"  {'plan':<19}{'mesh':<12}{'a device':<24}{'GB':>9} {'sends, GB':>10} {'step, s':>10} {'tokens/s':>12}")
        for one in found:
            mark = "*" if one is chosen else " " if fits(one, machine) else "-"
            print(f"{mark} {one.plan:<19}{_mesh(one):<12}{one.how:<24}{one.size / 1e9:>9.4g} "
                  f"{sum(one.traffic.values()) / 1e9:>10.4g} {one.time:>10.4g} {one.tokens / one.time:>12,.0f}")
        print(_reason(found, chosen, machine))
        if chosen is None and (more := enough(config, machine, devices, job)) is not None:
            print(f"{more[0]} devices are enough: {more[1].plan} on {_mesh(more[1])}, {more[1].size / 1e9:.1f} GB")


def _machine(gpu: str, tflops: float | None, memory: float | None, bandwidth: float | None, link: str,
             network: float | None, host: int) -> Machine:
    """The GPU's figures, but for those that are given. Raises `ValueError` for one that is not above 0."""
    machine = GPUS[gpu]._replace(host=integer("--host", host, 1))
    if link == "pcie":
        machine = machine._replace(link=PCIE_SPEED[gpu], latency=PCIE)
    elif link != "nvlink":
        try:
            machine = machine._replace(link=1e9 * number("--link", float(link), above=True))
        except ValueError:
            raise ValueError(f"--link must be \"nvlink\", \"pcie\" or a speed in GB/s above 0, got {link!r}") from None
    stated = {"flops": ("--tflops", tflops, 1e12), "memory": ("--memory", memory, 1e9),
              "bandwidth": ("--bandwidth", bandwidth, 1e9), "network": ("--network", network, 1e9)}
    return machine._replace(**{field: scale * number(name, value, above=True)
                               for field, (name, value, scale) in stated.items() if value is not None})


def _reason(found: list[Estimate], chosen: Estimate | None, machine: Machine) -> str:
    """Which plan to choose and why, and what it needs."""
    if chosen is None:
        least = min(found, key=lambda one: one.size)
        return (f"no plan fits: the least is {least.plan} on {_mesh(least)}, {_parts(least.memory)}; of a device's "
                f"{machine.memory / 1e9:.0f} GB, {USABLE * machine.memory / 1e9:.0f} may be used")
    fitting = sum(fits(one, machine) for one in found)
    seconds = ", ".join(f"{value:.3g} s {name}" for name, value in chosen.seconds.items())
    sends = _parts({f"{kind} {axis}": size for (kind, axis), size in chosen.traffic.items() if size > 1e3})
    token = sum(chosen.traffic.values()) / chosen.tokens
    return (f"choose {chosen.plan} on {_mesh(chosen)}: the fastest of the {fitting} that fit ({seconds})\n"
            f"  a device has {_parts(chosen.memory)}\n"
            f"  a device sends in a step {sends or 'nothing'}; a token, {token / 1e6:.4g} MB")


def _parts(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in sizes.items() if size)


def _mesh(estimate: Estimate) -> str:
    return ",".join(f"{name}={size}" for name, size in estimate.mesh.items())

