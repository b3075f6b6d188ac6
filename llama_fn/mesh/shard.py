"""`shard` and `unshard`: from whole trees to each device's parts, and back."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama_fn import tree
from llama_fn.config import LLAMA2_7B, Config
from llama_fn.mesh.collectives import MeshAxis, sliced
from llama_fn.mesh.connect import connect
from llama_fn.mesh.plan import Plan, check_mesh, check_plan, check_words, plan_of, rows_over
from llama_fn.mesh.sharded import Sharded, is_sharded
from llama_fn.mesh.sharding import Sharding, check_leaf, cut, joined
from llama_fn.model.cache import Cache
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params
from llama_fn.transforms.adapter import Lora, LowRank

T = TypeVar("T")
# The axes of each matrix by its field, whatever the sizes of the model.
AXES_OF = {path.rpartition(".")[2]: weight.axes for path, weight in tree.paths(abstract_params(LLAMA2_7B)).items()}


def make_mesh(sizes: Mapping[str, int], device: str = "cpu") -> DeviceMesh:
    """A mesh of the processes that ``torchrun`` started, with these axes (torch's ``init_device_mesh``).

    The first call in a process joins the others. Raises `ValueError` unless the product of the sizes is their number.

    >>> mesh = lf.mesh.make_mesh({"dp": 2, "tp": 2})
    """
    if not dist.is_initialized():
        connect(device)
    check_mesh(sizes, dist.get_world_size())
    return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def sizes_of(mesh: DeviceMesh) -> dict[str, int]:
    """The axes of a mesh and their sizes."""
    return {name: mesh.size(i) for i, name in enumerate(mesh.mesh_dim_names or ())}


def sharding(axes: str, mesh: DeviceMesh, plan: str | Plan) -> Sharding:
    """How a plan divides a leaf with these axes, as this device of the mesh sees it."""
    return sharding_over(axes, _axes(mesh), plan)


def sharding_over(axes: str, known: Mapping[str, MeshAxis], plan: str | Plan) -> Sharding:
    """How a plan divides a leaf with these axes over mesh axes, which are given by their names.

    A mesh axis of one device divides nothing: there is nobody to send to.
    """
    plan, names = plan_of(plan), tuple(axes.split())
    several = {name: axis for name, axis in known.items() if axis.size > 1}
    over = tuple(several.get(str(plan.get(axis))) for axis in names)
    return Sharding(names, over, tuple(several[name] for name in rows_over(plan) if name in several))


def shardings(config: Config, mesh: DeviceMesh, plan: str | Plan) -> Params:
    """A tree like `lf.Params` that has the `Sharding` of each leaf. Raises `ValueError` where the plan does not fit.

    >>> wq = lf.mesh.shardings(params.config, mesh, "tensor").blocks[0].attention.wq
    """
    check_plan(config, sizes_of(mesh), plan)
    return tree.map(lambda weight: sharding(weight.axes, mesh, plan), abstract_params(config))


def shard(whole: T, mesh: DeviceMesh, plan: str | Plan) -> T:
    """The device's own part of a tree that is the same on all devices.

    The tree holds parameters, adapters, caches or rows of tokens, each divided by its own axes: a leaf of `lf.Params`
    and `lf.lora.Lora` becomes a `Sharded`; the rows of a tensor and a cache's rows and heads are cut. ``plan`` is the
    name of a preset (`lf.mesh.PRESETS`) or a dict. Raises `ValueError` for a plan that does not fit, before anything is
    allocated.

    >>> params = lf.mesh.shard(params, mesh, "fsdp")
    >>> rows = lf.mesh.shard(batch, mesh, "fsdp")
    """
    plan = plan_of(plan)
    check_words(sizes_of(mesh), plan)

    def of(part: Any) -> Any:
        if isinstance(part, Params):
            own = tree.map_with_path(shard_weight, abstract_params(part.config), part,
                                     shardings(part.config, mesh, plan))
            return own._replace(output=own.embedding) if part.output is part.embedding else own
        if isinstance(part, Lora):
            return _adapter(part, mesh, plan)
        if isinstance(part, Cache):
            own = sharding("k s h", mesh, plan)
            k, v = tree.map(lambda x: _cut(rows_of(x, mesh, plan), own), (part.k, part.v))
            return Cache(k, v, rows_of(part.length, mesh, plan))
        return rows_of(part, mesh, plan)

    return tree.map(of, whole, is_leaf=lambda x: isinstance(x, Params | Lora | Cache))


def shard_weight(path: str, weight: Weight, x: Any, sharding: Sharding) -> Sharded:
    """`shard_leaf` of a weight. Raises `ValueError` for one that cannot be divided so."""
    check_leaf(path, weight, x, sharding)
    return shard_leaf(x, sharding)


def shard_leaf(x: Any, sharding: Sharding) -> Sharded:
    """The device's own part of one leaf; an axis that `vmap` maps may come first."""
    return Sharded(cut(x, sharding), sharding)


def rows_of(x: Tensor, mesh: DeviceMesh, plan: str | Plan) -> Tensor:
    """The device's own rows of a tensor, whose first axis the plan's ``*b`` divides.

    Raises `ValueError` for rows that cannot be divided evenly.
    """
    known = _axes(mesh)
    for name in rows_over(plan_of(plan)):
        if x.ndim == 0 or x.shape[0] % known[name].size:
            raise ValueError(f"{x.shape[0] if x.ndim else 'no'} rows cannot be divided over {known[name].size} devices "
                             f"({name}); choose a multiple of {known[name].size}")
        x = sliced(x, 0, known[name])
    return x


def unshard(parts: T) -> T:
    """The whole tree of a tree of parts, on every device. All devices must call it.

    Rows of tokens and caches stay as they are: they do not know of which whole they are a part.

    >>> whole = lf.mesh.unshard(params)
    """
    return tree.map(lambda x: unshard_leaf(x) if is_sharded(x) else x, parts, is_leaf=is_sharded)


def whole_leaves(parts: Any) -> Iterator[Tensor]:
    """The leaves of `unshard(parts)`, one at a time. All devices must go through them."""
    for x in tree.leaves(parts, is_sharded):
        yield from tree.leaves(unshard_leaf(x) if is_sharded(x) else x)


def unshard_leaf(part: Sharded) -> Any:
    """The whole of one leaf, on every device; an axis that `vmap` mapped may come first."""
    return joined(part.local, part.sharding)


def _cut(x: Tensor, own: Sharding) -> Tensor:
    """The device's own heads of a cache's keys or values."""
    return sliced(x, -3, own.local([0])[0]) if own.is_local(0) else x


def _axes(mesh: DeviceMesh) -> dict[str, MeshAxis]:
    """The axes of a mesh by their names, as this device sees them."""
    return {name: MeshAxis(name, mesh.size(i), mesh.get_local_rank(i), mesh.get_group(i).group_name)
            for i, name in enumerate(mesh.mesh_dim_names or ())}


def _adapter(adapter: Lora, mesh: DeviceMesh, plan: Plan) -> Lora:
    """The device's own part of an adapter: A is divided as the inputs of its weight are, and B as the outputs."""
    def of(path: str, matrices: LowRank) -> Any:  # a `LowRank` of sharded leaves
        if not isinstance(matrices.a, Tensor):
            raise ValueError(f"shard: {path} is divided already; lf.mesh.unshard the adapter first")
        axes = AXES_OF[path.rpartition(".")[2]].split()
        outer = len(axes) - (matrices.a.ndim - 1)
        a, b = (sharding(" ".join(names), mesh, plan) for names in (["r", *axes[outer:]], [*axes[:outer], "r"]))
        return matrices._replace(a=shard_leaf(matrices.a, a), b=shard_leaf(matrices.b, b))

    return adapter._replace(matrices={path: of(path, matrices) for path, matrices in adapter.matrices.items()})
