"""Random parameters, of which each device keeps its part."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from llama_fn import random, tree
from llama_fn.config import Config
from llama_fn.mesh.plan import Plan
from llama_fn.mesh.shard import shard_leaf, shardings
from llama_fn.model.init import abstract_params, draw
from llama_fn.model.transformer import Params
from llama_fn.random import Key


def init_parts(key: Key, config: Config, mesh: DeviceMesh, plan: str | Plan, dtype: torch.dtype = torch.float32,
               device: torch.device | str | None = None) -> Params:
    """The part of `init_params(key, config, dtype, device)` that this device has, bit for bit.

    One leaf at a time is drawn as a whole. Raises `ValueError` where the plan does not fit, before anything is drawn.
    """
    abstract, device = abstract_params(config), key.device if device is None else device
    divided = shardings(config, mesh, plan)
    keys = iter(random.split(key, len(tree.leaves(abstract))).to(device))
    return tree.map(lambda weight, own: shard_leaf(draw(next(keys), weight, dtype, device), own), abstract, divided)
