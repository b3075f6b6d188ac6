"""Models on a mesh: each process reads its own parts of the weights; whole weights are written, one at a time."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from llama_fn import tree
from llama_fn.checkpoint.parts import part_in
from llama_fn.checkpoint.weights import Weights
from llama_fn.mesh.plan import Plan
from llama_fn.mesh.ranks import Ranks
from llama_fn.mesh.shard import shardings
from llama_fn.mesh.sharded import Sharded, Sharding
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params


def sharded_params(weights: Weights, mesh: DeviceMesh, plan: str | Plan,
                   device: torch.device | str | None = None) -> Params:
    """The parts of all weights that this process has, on ``device``; None is the mesh's.

    No other part is read from the files. The parts are those of `shard`, bit for bit. Each lies in memory of its own.
    Raises `ValueError` for a plan that does not fit the model, before any weight is read, and for quantized weights.
    """
    over = shardings(weights.config, mesh, plan)
    if weights.bits:
        raise ValueError(f"weights that are quantized ({weights.bits}) cannot be divided over a mesh; load the model "
                         "that they were made of")
    on = mesh.device_type if device is None else device

    def leaf(path: str, weight: Weight, sharding: Sharding) -> Sharded | None:
        if weights.tied and path == "output":
            return None
        part = part_in(weight.shape, sharding)
        local = torch.empty(part.shape, dtype=weights.dtype, device=on)
        return Sharded(local.copy_(weights.read(path, part)), sharding)

    params = tree.map_with_path(leaf, abstract_params(weights.config), over)
    return params._replace(output=params.embedding) if weights.tied else params


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
