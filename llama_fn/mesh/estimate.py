"""What a model needs by each plan: memory, bytes sent, time. On paper, from the abstract tree.

Memory of training: parameters, gradients and moments (Rajbhandari et al. 2020, "ZeRO", section 3.1), gathered weights,
and activations (Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", section 4,
for this model's layer). Products: 6 a parameter and token, and attention's (Chowdhery et al. 2022, "PaLM", appendix B,
with the masked half left out). Time: products or reading, then sending; a device does one after the other.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from llama_fn import tree
from llama_fn.config import Config
from llama_fn.mesh.machine import MEMORY, PRODUCTS, USABLE, Machine, sending
from llama_fn.mesh.plan import check_plan, plan_of, rows_over
from llama_fn.mesh.predict import Collective, Work, abstract_shard, of_forward, of_gradient, of_norm, times, total
from llama_fn.mesh.sharded import Sharded, is_sharded
from llama_fn.mesh.traffic import RING, Traffic, sent
from llama_fn.model.init import abstract_params

LOGITS = 2**24  # of a loss, in memory at once (training/chunked_loss.py)


class Training(NamedTuple):
    """A training step of AdamW: so many rows of so many tokens, with parameters and products in these dtypes."""

    rows: int
    context: int
    stored: torch.dtype
    computed: torch.dtype


class Decoding(NamedTuple):
    """A step of decoding: one more token for so many rows, whose caches are full, in a dtype."""

    rows: int
    context: int
    dtype: torch.dtype


class Estimate(NamedTuple):
    """A step by one plan on one mesh: bytes in a device's memory, bytes it sends, and seconds, each by their reason."""

    plan: str
    mesh: Mapping[str, int]
    how: str
    tokens: int
    memory: dict[str, float]
    traffic: Traffic
    seconds: dict[str, float]

    @property
    def size(self) -> float:
        """The bytes in a device's memory."""
        return sum(self.memory.values())

    @property
    def time(self) -> float:
        """The seconds of a step."""
        return sum(self.seconds.values())


def meshes(devices: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Each preset with each mesh of so many devices that it can have."""
    yield "replicated", {"dp": devices}
    if devices > 1:
        yield from (("fsdp", {"dp": devices}), ("tensor", {"tp": devices}))
    for tp in range(2, devices):
        if devices % tp == 0:
            yield from ((plan, {"dp": devices // tp, "tp": tp}) for plan in ("replicated+tensor", "fsdp+tensor"))


def estimates(config: Config, machine: Machine, devices: int, job: Training | Decoding) -> list[Estimate]:
    """A job by each preset on each mesh that divides model and rows evenly."""
    return [training(config, machine, mesh, plan, job) if isinstance(job, Training)
            else decoding(config, machine, mesh, plan, job)
            for plan, mesh in meshes(devices) if obstacle(config, mesh, plan, job) is None]


def obstacle(config: Config, mesh: Mapping[str, int], plan: str, job: Training | Decoding) -> str | None:
    """Why a plan cannot divide the model or the rows evenly over a mesh; None if it can."""
    try:
        check_plan(config, mesh, plan)
    except ValueError as error:
        return str(error).removeprefix("plan: ")
    parts = prod(mesh[name] for name in rows_over(plan_of(plan)))
    return f"{job.rows} rows cannot be divided evenly over {parts} devices" if job.rows % parts else None


def fits(estimate: Estimate, machine: Machine) -> bool:
    """Whether a device's memory is large enough."""
    return estimate.size <= USABLE * machine.memory


def best(found: list[Estimate], machine: Machine) -> Estimate | None:
    """The fastest of those that fit; of two as fast, the smaller. None if none fits."""
    return min((x for x in found if fits(x, machine)), key=lambda x: (x.time, x.size), default=None)


def enough(config: Config, machine: Machine, devices: int, job: Training | Decoding) -> tuple[int, Estimate] | None:
    """The first doubling of the devices for which a plan fits, up to 4,096 of them, and the fastest plan for it."""
    while (devices := 2 * devices) <= 4096:
        if (found := best(estimates(config, machine, devices, job), machine)) is not None:
            return devices, found
    return None


def training(config: Config, machine: Machine, mesh: Mapping[str, int], plan: str, job: Training) -> Estimate:
    """A training step: in as many micro-batches and with such recomputation that it fits and is fastest."""
    own = job.rows // prod(mesh[name] for name in rows_over(plan_of(plan)))
    found = [_training(config, machine, mesh, plan, job, own // count, count, recomputed)
             for count in range(1, own + 1) if own % count == 0 for recomputed in (False, True)]
    return best(found, machine) or min(found, key=lambda x: x.size)


def _training(config: Config, machine: Machine, mesh: Mapping[str, int], plan: str, job: Training, rows: int,
              count: int, recomputed: bool) -> Estimate:
    """A training step of `count` micro-batches, of so many rows a device."""
    layer, ends = _parts(config, mesh, plan)
    tokens, item, stored = rows * job.context, job.computed.itemsize, job.stored.itemsize
    own = config.n_layers * _numbers(layer) + _numbers(ends)
    layers, in_chunks = 1 if recomputed else config.n_layers, tokens * config.vocab_size > LOGITS
    inputs = config.n_layers * config.dim * item if recomputed else 0  # from which layers are computed again
    memory: dict[str, float] = {
        "parameters": own * (stored + (item if job.computed != job.stored else 0)),
        "gradients": own * stored * (3 if count > 1 else 1),  # two, while their sum is made
        "moments": own * 2 * max(4, stored),
        "gathered": item * (_gathered(layer) + _gathered(ends[-1]) + _gathered(layer.feed_forward.w_up)),  # a gradient
        "activations": tokens * (layers * _saved(config, layer, item) + inputs)
                       + min(tokens * config.vocab_size, LOGITS) * (item + 3 * 4),  # and log p and gradient
    }
    work = Work(job.rows // count, job.context, job.computed)
    gradient = of_gradient(config, mesh, plan, work, compiled=True, recomputed=recomputed, in_chunks=in_chunks)
    collectives = times(count, gradient) + of_norm(config, mesh, plan)
    all_tokens, weights = job.rows * job.context, config.n_params - config.vocab_size * config.dim
    products = 2 * (4 if recomputed else 3) * (weights + config.n_layers * config.dim * job.context) * all_tokens
    seconds = {"products": products / prod(mesh.values()) / (PRODUCTS * machine.flops),
               "sending": _seconds(machine, mesh, collectives)}
    how = f"{count} x {_rows(rows)}" + (", remat" if recomputed else "")
    return Estimate(plan, mesh, how, all_tokens, memory, total(collectives), seconds)


def decoding(config: Config, machine: Machine, mesh: Mapping[str, int], plan: str, job: Decoding) -> Estimate:
    """A step that decodes one token of each row."""
    layer, ends = _parts(config, mesh, plan)
    rows, item = job.rows // prod(mesh[name] for name in rows_over(plan_of(plan))), job.dtype.itemsize
    cache = 2 * config.n_layers * rows * job.context * layer.attention.wk.shape[0] * config.head_dim * item
    memory: dict[str, float] = {"parameters": item * (config.n_layers * _numbers(layer) + _numbers(ends)),
                                "gathered": item * max(_gathered(layer), _gathered(ends[-1])), "cache": cache}
    used = config.n_layers * _used(layer) + _used(ends[1:])  # of the embedding, a row a token is
    collectives = of_forward(config, mesh, plan, Work(job.rows, 1, job.dtype))
    seconds = {"reading": max((item * used + cache) / (MEMORY * machine.bandwidth),
                              2 * rows * used / (PRODUCTS * machine.flops)),
               "sending": _seconds(machine, mesh, collectives)}
    return Estimate(plan, mesh, _rows(rows), job.rows, memory, total(collectives), seconds)


def _parts(config: Config, mesh: Mapping[str, int], plan: str) -> tuple[Any, tuple[Sharded, ...]]:
    """One device's parts of one layer; and of embedding, last norm and head."""
    params = abstract_params(config)
    ends = (params.embedding, params.norm, params.output)
    return tree.map(lambda weight: abstract_shard(weight, mesh, plan), (params.blocks[0], ends))


def _seconds(machine: Machine, mesh: Mapping[str, int], collectives: Counter[Collective]) -> float:
    return sum(often * sending(machine, mesh, axis.name, RING[kind] * (axis.size - 1), sent(kind, size, axis.size))
               for (kind, axis, size), often in collectives.items())


def _numbers(parts: Any) -> int:
    """The numbers that a device keeps."""
    return sum(part.local.numel() for part in tree.leaves(parts, is_sharded))


def _used(parts: Any) -> int:
    """The numbers with which a device computes."""
    found = 0
    for part in tree.leaves(parts, is_sharded):
        own = part.sharding
        found += part.local.numel() * prod(axis.size for i, axis in enumerate(own.over)
                                           if axis is not None and not own.is_local(i))
    return found


def _gathered(parts: Any) -> int:
    """The numbers that are in memory beside a device's own while it uses these weights."""
    return sum(_used(part) for part in tree.leaves(parts, is_sharded) if _used(part) > _numbers(part))


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"


def _saved(config: Config, layer: Any, itemsize: int) -> int:
    """The bytes a token that the forward of a layer saves for its backward.

    Both norms save their input in float32, their quotient and their result. Attention saves queries, keys, values and
    the heads' results, and the feed-forward four hidden vectors: gate, its silu, up and their product. A device has its
    own heads and hidden numbers only.
    """
    k, g, h, _ = layer.attention.wq.shape
    hidden = layer.feed_forward.w_up.shape[0]
    return 2 * config.dim * max(4, itemsize) + itemsize * (4 * config.dim + 2 * k * g * h + 2 * k * h + 4 * hidden)
