"""What a plan sends, from the axes of the leaves alone: no device, no numbers.

Each use of a weight, and each product with a divided weight, has its collectives:

    what is divided                              forward                     backward
    a weight over the devices of other rows      all-gather the weight       reduce-scatter its gradient
    a weight over other devices, but k, f, v     all-gather the weight       nothing
    the rows, and not this weight                nothing                     all-reduce its gradient
    outputs k (wq, wk, wv), f (w_gate, w_up)     nothing                     all-reduce the gradient of x, once for all
    inputs k (wo), f (w_down)                    all-reduce the result       nothing
    outputs v (the head of `forward`)            all-gather the logits       all-reduce the gradient of x
    outputs v (the loss, `entropy.py`)           all-reduce 3 numbers        all-reduce the gradient of x
    the rows v of the embedding                  all-reduce the result       nothing

A compiled step gathers the weights of layers and head once more in its backward, instead of keeping them.

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
from llama_fn.mesh.shard import sharding_over
from llama_fn.mesh.sharded import Sharded, is_sharded
from llama_fn.mesh.sharding import Sharding
from llama_fn.mesh.traffic import Traffic, sent
from llama_fn.model.init import abstract_params


class Collective(NamedTuple):
    """One collective: its kind, the mesh axis, and the bytes of the whole tensor."""

    kind: str
    axis: MeshAxis
    size: int


class Sends(NamedTuple):
    """The collectives of a part of the model, each with how often it runs."""

    gather: Counter[Collective]  # of weights, forward
    forward: Counter[Collective]  # of activations
    backward: Counter[Collective]


class Work(NamedTuple):
    """What is computed: so many rows of so many tokens each, in a dtype."""

    rows: int
    tokens: int
    dtype: torch.dtype


def abstract_sharding(axes: str, mesh: Mapping[str, int], plan: str | Plan) -> Sharding:
    """How a plan divides a leaf over a mesh of these sizes, of which no device need exist."""
    return sharding_over(axes, {name: MeshAxis(name, size, 0, name) for name, size in mesh.items()}, plan)


def abstract_shard(weight: Any, mesh: Mapping[str, int], plan: str | Plan) -> Sharded:
    """One device's part of a leaf of `abstract_params`, as a tensor without numbers."""
    own = abstract_sharding(weight.axes, mesh, plan)
    shape = (n if axis is None else n // axis.size for n, axis in zip(weight.shape, own.over, strict=True))
    return Sharded(torch.empty(tuple(shape), device="meta"), own)


def of_weight(part: Sharded, itemsize: int) -> Sends:
    """What one use of a weight sends."""
    gather, backward, own, size = [], [], part.sharding, part.local.numel() * itemsize
    for i, axis in enumerate(own.over):
        if axis is not None and not own.is_local(i):
            size *= axis.size
            gather.append(Collective("all-gather", axis, size))
            if axis in own.batch:
                backward.append(Collective("reduce-scatter", axis, size))
    backward += [Collective("all-reduce", axis, size) for axis in own.batch if axis not in own.over]
    return Sends(Counter(gather), Counter(), Counter(backward))


def of_products(parts: Sequence[Sharded], inputs: int, x_size: int) -> Sends:
    """What the products of several weights with one x send beside the weights: x and the result have `x_size` bytes."""
    own = parts[0].sharding
    outer = len(own.axes) - inputs
    backward = Counter(Collective("all-reduce", axis, x_size) for axis in own.local(range(outer)))
    forward = Counter(Collective("all-reduce", axis, x_size) for axis in own.local(range(outer, len(own.axes))))
    return Sends(Counter(), forward, backward)


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
    return added([of_weight(table, work.dtype.itemsize), Sends(Counter(), Counter(rows), Counter())])


def of_head(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work, *, loss: bool) -> Sends:
    """What the last norm and the head send: in `forward` for the logits, in a `loss` for the cross-entropy of parts."""
    params, x_size = abstract_params(config), _x_size(config, mesh, plan, work)
    norm, output = (abstract_shard(weight, mesh, plan) for weight in (params.norm, params.output))
    tokens = x_size // config.dim // work.dtype.itemsize
    results = ([Collective("all-reduce", axis, tokens * exact(work.dtype)) for axis in output.sharding.local([0])] * 3
               if loss else [Collective("all-gather", axis, tokens * config.vocab_size * work.dtype.itemsize)
                             for axis in output.sharding.local([0])])
    weights = [of_weight(part, work.dtype.itemsize) for part in (norm, output)]
    return added([*weights, of_products([output], 1, x_size), Sends(Counter(), Counter(results), Counter())])


def of_forward(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work) -> Counter[Collective]:
    """What `forward` sends; a cache sends nothing, because its rows and heads lie where they are used."""
    head = of_head(config, mesh, plan, work, loss=False)
    layer, embedding = of_layer(config, mesh, plan, work), of_embedding(config, mesh, plan, work)
    return sum((part.gather + part.forward for part in (embedding, *[layer] * config.n_layers, head)), Counter())


def of_gradient(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work, *, compiled: bool = False,
                recomputed: bool = False, in_chunks: bool = False) -> Counter[Collective]:
    """What the loss of rows of this many tokens and its gradient send.

    A `compiled` step gathers weights twice. `recomputed` layers (`remat`) run twice, and so does a loss `in_chunks`,
    which gathers its weights once.
    """
    work = work._replace(tokens=work.tokens - 1)  # nothing is predicted from the last one
    layer, embedding = of_layer(config, mesh, plan, work), of_embedding(config, mesh, plan, work)
    head = of_head(config, mesh, plan, work, loss=True)
    loss = Counter(Collective("all-reduce", axis, size) for axis in abstract_sharding("d", mesh, plan).batch
                   for size in (torch.int64.itemsize, exact(work.dtype)))  # how many tokens count, and the sum
    of_layers = (times(2 if compiled or recomputed else 1, layer.gather) + times(2 if recomputed else 1, layer.forward)
                 + layer.backward)
    of_ends = (embedding.gather + embedding.forward + embedding.backward + loss
               + times(2 if compiled and not in_chunks else 1, head.gather)
               + times(2 if in_chunks else 1, head.forward) + head.backward)
    return of_ends + times(config.n_layers, of_layers)


def of_norm(config: Config, mesh: Mapping[str, int], plan: str | Plan) -> Counter[Collective]:
    """What the gradient's norm sends: a sum in float32 for all leaves that are divided alike."""
    params = abstract_params(config)
    leaves = tree.leaves((params.embedding, params.blocks[0], params.norm, params.output))
    alike = {tuple(axis for axis in abstract_sharding(weight.axes, mesh, plan).over if axis is not None)
             for weight in leaves}
    return Counter(Collective("all-reduce", axis, torch.float32.itemsize) for over in alike for axis in over)


def exact(dtype: torch.dtype) -> int:
    """The bytes of a number of a loss, which is in float32 at least."""
    return torch.promote_types(dtype, torch.float32).itemsize


def added(sends: Iterable[Sends]) -> Sends:
    """All of them."""
    return Sends(*(sum(some, Counter()) for some in zip(*sends, strict=True)))


def times(count: int, collectives: Counter[Collective]) -> Counter[Collective]:
    """The collectives, each so many times as often."""
    return Counter({one: count * often for one, often in collectives.items()})


def total(collectives: Counter[Collective]) -> Traffic:
    """The bytes that a device sends, by kind and mesh axis."""
    traffic: Traffic = {}
    for (kind, axis, size), often in collectives.items():
        if axis.size == 1:
            continue
        traffic[kind, axis.name] = traffic.get((kind, axis.name), 0.0) + often * sent(kind, size, axis.size)
    return traffic


def _x_size(config: Config, mesh: Mapping[str, int], plan: str | Plan, work: Work) -> int:
    """The bytes of one device's activations of width d."""
    rows = work.rows // prod(mesh[name] for name in rows_over(plan_of(plan)))
    return rows * work.tokens * config.dim * work.dtype.itemsize
