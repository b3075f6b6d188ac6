"""Models on a mesh: each process reads its own parts of the weights; whole weights are written, one at a time."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from llama_fn import tree
from llama_fn.checkpoint.parts import part_in
from llama_fn.checkpoint.weights import Weights
from llama_fn.mesh.plan import Plan
from llama_fn.mesh.ranks import Ranks
from llama_fn.mesh.shard import shard_weight, shardings
from llama_fn.mesh.sharded import Sharded
from llama_fn.mesh.sharding import Sharding
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params
from llama_fn.transforms.quantize import is_matrix


def sharded_params(weights: Weights, mesh: DeviceMesh, plan: str | Plan, device: torch.device | str | None = None,
                   convert: Callable[[str, Weight, Any], Any] | None = None) -> Params:
    """The parts of all weights that this process has, on ``device``; None is the mesh's.

    No other part is read from the files, but a quantized weight is read whole, one at a time. The parts are those of
    `shard`, bit for bit. Each lies in memory of its own. ``convert`` is that of `params_of`, applied to each part as
    soon as it is read. Raises `ValueError` for a plan that does not fit the model, before any weight is read.
    """
    over = shardings(weights.config, mesh, plan)
    on = mesh.device_type if device is None else device

    def leaf(path: str, weight: Weight, sharding: Sharding) -> Sharded | None:
        if weights.tied and path == "output" and convert is None:
            return None
        if weights.bits and is_matrix(path, weight):
            return shard_weight(path, weight, tree.map(lambda x: x.to(on), weights.read(path)), sharding)
        part = part_in(weight.shape, sharding)
        local = torch.empty(part.shape, dtype=weights.dtype, device=on)
        own = Sharded(local.copy_(weights.read(path, part)), sharding)
        return own if convert is None else convert(path, weight, own)

    params = tree.map_with_path(leaf, abstract_params(weights.config), over)
    return params._replace(output=params.embedding) if params.output is None else params


def write_together(weights: Weights, ranks: Ranks, write: Callable[[Weights], None]) -> None:
    """Run ``write(weights)`` on rank 0, for whose every read the other processes give their parts.

    Every process has one gathered weight in memory at a time. An error of `write` is raised by all.
    """
    def tell(what: str | Exception | None) -> str | Exception | None:
        told = [what]
        dist.broadcast_object_list(told, 0, ranks.group)
        return told[0]

    def read(path: str) -> Tensor:
        tell(path)
        return weights.read(path)

    if ranks.rank == 0:
        result: Exception | None = RuntimeError("rank 0 did not write the model to its end")
        try:
            write(weights._replace(read=read))
            result = None
        except (OSError, ValueError) as error:
            result = error
            raise
        finally:
            tell(result)
        return
    while isinstance(told := tell(None), str):
        weights.read(told)
    if told is not None:
        raise told
