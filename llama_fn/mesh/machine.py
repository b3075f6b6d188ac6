"""What GPUs can do, by their makers' data sheets, and how fast a mesh axis sends.

The figures are those of the SXM boards: NVIDIA H100, H200 and A100 80GB Tensor Core GPU data sheets (bfloat16 products
without sparsity; half of a link's two-way figure, since a ring sends one way), and the DGX H100, H200 and A100 data
sheets for the network: eight GPUs a host, each with an InfiniBand card of its own (400 Gb/s; A100: 200 Gb/s).
"""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple


class Machine(NamedTuple):
    """One device and its links; speeds are in bytes a second, one way."""

    flops: float  # products in bfloat16, a second
    memory: float  # bytes
    bandwidth: float  # of that memory
    link: float  # to the other devices of a host
    network: float  # to other hosts
    host: int = 8  # devices
    latency: float = 0.47e-6  # seconds, of one step of a ring within a host


NVLINK, PCIE, INFINIBAND = 0.47e-6, 1.0e-6, 2.7e-6  # seconds a step of a ring: NCCL, src/graph/tuning.cc, protocol LL
START = 3.6e-6  # seconds until a collective starts, by the same source
GPUS = {
    "h100": Machine(989.4e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Machine(989.4e12, 141e9, 4.8e12, 450e9, 50e9),
    "a100": Machine(312e12, 80e9, 2.039e12, 300e9, 25e9),
}
PCIE_SPEED = {"h100": 64e9, "h200": 64e9, "a100": 32e9}  # Gen5 and Gen4, 16 lanes, one way: the same data sheets

# What of the data sheets' figures a program reaches. Products: 44 to 52 % for models of 18B to 530B (Narayanan et al.
# 2021, "Efficient large-scale language model training on GPU clusters", table 1). Memory: 85 %, decoding 7B in bfloat16
# on one H100 (examples/bench). Links: 370 of 450 GB/s ("How to scale your model", chapter 12).
PRODUCTS, MEMORY, LINKS = 0.5, 0.85, 0.8
USABLE = 0.9  # of the memory: CUDA, NCCL and fragments have the rest


def sending(machine: Machine, mesh: Mapping[str, int], name: str, steps: int, sent: float) -> float:
    """The seconds of a collective over a mesh axis: its start, the steps of a ring, and the bytes that a device sends.

    The devices of the last axis are neighbors. An axis that stays in a host sends over its links. One that leaves it
    has the network cards of as many devices as it has in a host ("How to scale your model", chapter 12).
    """
    names = list(mesh)
    stride = prod(mesh[other] for other in names[names.index(name) + 1:])
    within = min(mesh[name], max(1, machine.host // stride))  # devices of this axis in one host
    hosts = -(-mesh[name] // within)
    if hosts == 1:
        return START + steps * machine.latency + sent / (LINKS * machine.link)
    between = steps * (hosts - 1) / (mesh[name] - 1)  # steps from host to host
    latency = between * INFINIBAND + (steps - between) * machine.latency
    return START + latency + sent / (LINKS * min(machine.link, within * machine.network))
