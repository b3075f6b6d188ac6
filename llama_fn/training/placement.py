"""Where a run takes its steps: what its manifest says of the mesh, and whether `torchrun` started it before."""

from pathlib import Path
from typing import Any

from llama_fn.mesh.shard import sizes_of
from llama_fn.mesh.world import World
from llama_fn.text import read_json

ON = "on"  # the entry of a manifest; one process on its own writes none


def facts_of(world: World) -> dict[str, Any]:
    """Where a run takes its steps, which may be elsewhere when it is resumed: the mesh, its plan, and its job."""
    if world.mesh is None:
        return {}
    plan = world.plan if isinstance(world.plan, str) else dict(world.plan)
    return {ON: {"mesh": sizes_of(world.mesh), "plan": plan, "job": world.job}}


def goes_on(manifest_file: Path, world: World) -> bool:
    """Whether `torchrun` has started this run already, and starts it again after one of its processes ended."""
    if not (world.restarts and world.job and manifest_file.is_file()):
        return False
    manifest = read_json(manifest_file)
    on = manifest.get(ON) if isinstance(manifest, dict) else None
    return isinstance(on, dict) and on.get("job") == world.job
