"""What a plan sends, from the axes of the leaves alone: no device, no numbers.

Each use of a weight, and each product with a divided weight, has its collectives:

    what is divided                              forward                     backward
    a weight over the devices of other rows      all-gather the weight       reduce-scatter its gradient
    a weight over other devices, but k, f, v     all-gather the weight       nothing
    the rows, and not this weight                nothing                     all-reduce its gradient
    outputs k (wq, wk, wv), f (w_gate, w_up)     nothing                     all-reduce the gradient of x, once for all
    inputs k (wo), f (w_down)                    all-reduce the result       nothing
    outputs v (the head)                         all-gather the logits       all-reduce the gradient of x
    the rows v of the embedding                  all-reduce the result       nothing

(Shoeybi et al. 2019, "Megatron-LM", section 3; Rajbhandari et al. 2020, "ZeRO", section 7.) `traffic.py` counts what
runs, and the tests compare.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from llama_fn import tree
from llama_fn.config import Config
from llama_fn.mesh.collectives import MeshAxis
from llama_fn.mesh.plan import Plan, plan_of, rows_over
from llama_fn.mesh.sharded import VOCABULARY, Sharded, Sharding, is_sharded
from llama_fn.mesh.traffic import Traffic, sent
from llama_fn.model.init import abstract_params


class Collective(NamedTuple):
    """One collective: its kind, the mesh axis, and the bytes of the whole tensor."""

    kind: str
    axis: MeshAxis
    size: int


class Sends(NamedTuple):
    """The collectives of the forward, and those of the backward, each with how often it runs."""

    forward: Counter[Collective]
    backward: Counter[Collective]


class Work(NamedTuple):
    """What is computed: so many rows of so many tokens each, in a dtype."""

    rows: int
    tokens: int
    dtype: torch.dtype


def abstract_sharding(axes: str, mesh: Mapping[str, int], plan: str | Plan) -> Sharding:
    """How a plan divides a leaf over a mesh of these sizes, of which no device need exist."""
    plan, known = plan_of(plan), {name: MeshAxis(name, size, 0, name) for name, size in mesh.items()}
    over = tuple(known[str(plan[axis])] if axis in plan else None for axis in axes.split())
    return Sharding(tuple(axes.split()), over, tuple(known[name] for name in rows_over(plan)))


def abstract_shard(weight: Any, mesh: Mapping[str, int], plan: str | Plan) -> Sharded:
    """One device's part of a leaf of `abstract_params`, as a tensor without numbers."""
    own = abstract_sharding(weight.axes, mesh, plan)
    shape = (n if axis is None else n // axis.size for n, axis in zip(weight.shape, own.over, strict=True))
    return Sharded(torch.empty(tuple(shape), device="meta"), own)


def of_weight(part: Sharded, itemsize: int) -> Sends:
    """What one use of a weight sends."""
    forward, backward, own, size = [], [], part.sharding, part.local.numel() * itemsize
    for i, axis in enumerate(own.over):
        if axis is not None and not own.is_local(i):
            size *= axis.size
            forward.append(Collective("all-gather", axis, size))
            if axis in own.batch:
                backward.append(Collective("reduce-scatter", axis, size))
    backward += [Collective("all-reduce", axis, size) for axis in own.batch if axis not in own.over]
    return Sends(Counter(forward), Counter(backward))


def of_products(parts: Sequence[Sharded], inputs: int, x_size: int, logits_size: int = 0) -> Sends:
    """What the products of several weights with one x send beside the weights: x and the result have `x_size` bytes."""
    own = parts[0].sharding
    outer = len(own.axes) - inputs
    backward = [Collective("all-reduce", axis, x_size) for axis in own.local(range(outer))]
    forward = [Collective("all-reduce", axis, x_size) for axis in own.local(range(outer, len(own.axes)))]
    forward += [Collective("all-gather", axis, logits_size) for i in range(outer) if own.axes[i] == VOCABULARY
                for axis in own.local([i])]
    return Sends(Counter(forward), Counter(backward))


def of_layer(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work) -> Sends:
    """What one layer sends."""
    layer, x_size = abstract_params(config).blocks[0], _x_size(config, mesh, plan, work)
    parts = tree.map(lambda weight: abstract_shard(weight, mesh, plan), layer)
    attention, feed_forward = parts.attention, parts.feed_forward
    return added([of_weight(part, work.dtype.itemsize) for part in tree.leaves(parts, is_sharded)] + [
        of_products([attention.wq, attention.wk, attention.wv], 1, x_size),
        of_products([attention.wo], 3, x_size),
        of_products([feed_forward.w_gate, feed_forward.w_up], 1, x_size),
        of_products([feed_forward.w_down], 1, x_size)])


def of_embedding(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work) -> Sends:
    """What looking up the tokens sends."""
    table = abstract_shard(abstract_params(config).embedding, mesh, plan)
    rows = [Collective("all-reduce", axis, _x_size(config, mesh, plan, work)) for axis in table.sharding.local([0])]
    return added([of_weight(table, work.dtype.itemsize), Sends(Counter(rows), Counter())])


def of_head(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work, uses: int = 1) -> Sends:
    """What the last norm and the head send, if the logits are computed in so many chunks."""
    params, x_size = abstract_params(config), _x_size(config, mesh, plan, work)
    norm, output = (abstract_shard(weight, mesh, plan) for weight in (params.norm, params.output))
    return added([of_weight(part, work.dtype.itemsize) for part in (norm, output)] * uses
                 + [of_products([output], 1, x_size, x_size // config.dim * config.vocab_size)])


def of_forward(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work) -> Counter[Collective]:
    """What `forward` sends; a cache sends nothing, because its rows and heads lie where they are used."""
    layer, embedding, head = (f(config, mesh, plan, work).forward for f in (of_layer, of_embedding, of_head))
    return embedding + times(config.n_layers, layer) + head


def of_gradient(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work, *, recomputed: bool = False,
                chunks: int = 1) -> Counter[Collective]:
    """What the loss of rows of this many tokens and its gradient send.

    `recomputed` layers (`remat`) run twice. The loss of many tokens runs in `chunks`, each of which runs twice.
    """
    work = work._replace(tokens=work.tokens - 1)  # nothing is predicted from the last one
    layer, embedding = of_layer(config, mesh, plan, work), of_embedding(config, mesh, plan, work)
    head, exact = of_head(config, mesh, plan, work, chunks), torch.promote_types(work.dtype, torch.float32)
    over = abstract_sharding("d", mesh, plan).batch
    loss = Counter(Collective("all-reduce", axis, dtype.itemsize) for axis in over for dtype in (torch.int64, exact))
    forward = (embedding.forward + times(config.n_layers * (2 if recomputed else 1), layer.forward)
               + times(2 if chunks > 1 else 1, head.forward) + loss)
    return forward + head.backward + times(config.n_layers, layer.backward) + embedding.backward


def added(sends: Iterable[Sends]) -> Sends:
    """All of them, forward and backward."""
    forward, backward = Counter(), Counter()
    for some in sends:
        forward.update(some.forward)
        backward.update(some.backward)
    return Sends(forward, backward)


def times(count: int, collectives: Counter[Collective]) -> Counter[Collective]:
    """The collectives, each so many times as often."""
    return Counter({one: count * often for one, often in collectives.items()})


def total(collectives: Counter[Collective]) -> Traffic:
    """The bytes that a device sends, by kind and mesh axis."""
    traffic: Traffic = {}
    for (kind, axis, size), often in collectives.items():
        traffic[kind, axis.name] = traffic.get((kind, axis.name), 0.0) + often * sent(kind, size, axis.size)
    return traffic


def _x_size(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work) -> int:
    """The bytes of one device's activations of width d."""
    rows = work.rows // prod(mesh[name] for name in rows_over(plan_of(plan)))
    return rows * work.tokens * config.dim * work.dtype.itemsize
