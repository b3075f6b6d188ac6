"""Many devices: `shard` divides a tree over a mesh by a plan, and the model's functions run on the parts."""

from llama_fn.mesh.plan import PRESETS, Plan, check_plan, parse_mesh
from llama_fn.mesh.shard import make_mesh, shard, shardings, unshard
from llama_fn.mesh.sharded import Sharded
from llama_fn.mesh.sharding import Sharding
from llama_fn.mesh.traffic import counted

__all__ = ["PRESETS", "Plan", "Sharded", "Sharding", "check_plan", "counted", "make_mesh", "parse_mesh", "shard",
           "shardings", "unshard"]
