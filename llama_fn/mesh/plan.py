"""Plans: which mesh axis divides which axis of the model, in a handful of words.

A plan maps the axes of `shapes.py` to mesh axes: ``{"*b": "dp", "k": "tp", "f": "tp", "v": "tp"}`` divides the rows of
a batch over ``dp``, and heads, hidden numbers and vocabulary over ``tp``. The axes of each leaf stand in the abstract
tree, so the plan says all there is to say about every leaf. `sharded.py` says how a device computes with its parts.
"""

import math
from collections.abc import Mapping

from llama_fn import tree
from llama_fn.config import Config
from llama_fn.model.init import Weight, abstract_params
from llama_fn.ranges import integer

Plan = Mapping[str, str | tuple[str, ...]]  # from an axis to a mesh axis; the rows "*b" may have several

PRESETS: Mapping[str, Plan] = {
    "replicated": {"*b": "dp"},
    "fsdp": {"*b": "dp", "d": "dp"},
    "tensor": {"k": "tp", "f": "tp", "v": "tp"},
    "replicated+tensor": {"*b": "dp", "k": "tp", "f": "tp", "v": "tp"},
    "fsdp+tensor": {"*b": "dp", "d": "dp", "k": "tp", "f": "tp", "v": "tp"},
}
AXES = ("k", "g", "h", "d", "f", "v")  # the axes of weights


def parse_mesh(text: str) -> dict[str, int]:
    """A mesh's axes and their sizes from words like "dp=2,tp=4".

    Raises `ValueError` for words of another form, for a size below 1, and for an axis that comes twice.

    >>> sizes = lf.mesh.parse_mesh("dp=2,tp=4")
    """
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if not (name.isidentifier() and equals and size.strip().isdecimal() and int(size) > 0):
            raise ValueError(f"mesh {text!r}: {part!r} should be an axis and its size, as in \"dp=2,tp=4\"")
        if name in mesh:
            raise ValueError(f"mesh {text!r}: the axis {name!r} comes twice")
        mesh[name] = int(size)
    return mesh


def plan_of(plan: str | Plan) -> Plan:
    """A plan, or that of a preset's name. Raises `ValueError` for an unknown name."""
    if isinstance(plan, Mapping):
        return plan
    if not isinstance(plan, str) or plan not in PRESETS:
        raise ValueError(f"plan {plan!r} is not known; there are {', '.join(PRESETS)}, or a dict of axes to mesh axes")
    return PRESETS[plan]


def default_plan(mesh: Mapping[str, int]) -> str:
    """The preset for a mesh of these axes: tensor for "tp", fsdp for "dp", or both.

    Raises `ValueError` for other axes, which need a plan of their own.
    """
    names = {("dp",): "fsdp", ("tp",): "tensor", ("dp", "tp"): "fsdp+tensor"}
    if (known := tuple(sorted(mesh))) not in names:
        raise ValueError(f"no preset has a mesh of the axes {', '.join(mesh)}; give a plan, or name the axes dp and tp")
    return names[known]


def rows_over(plan: Plan) -> tuple[str, ...]:
    """The mesh axes that divide the rows of a batch."""
    over = plan.get("*b", ())
    return (over,) if isinstance(over, str) else tuple(over)


def check_plan(config: Config, mesh: Mapping[str, int], plan: str | Plan, world: int | None = None) -> None:
    """Raise `ValueError` that names what is wrong, if a plan does not fit a model and a mesh of these sizes.

    The mesh must have as many devices as the world, if that is given. Nothing is allocated.

    >>> lf.mesh.check_plan(lf.LLAMA2_70B, {"dp": 2, "tp": 8}, "fsdp+tensor")
    """
    plan = plan_of(plan)
    check_mesh(mesh, world)
    check_words(mesh, plan)
    for path, weight in tree.paths(abstract_params(config)).items():
        _check_leaf(path, weight, mesh, plan)


def check_words(mesh: Mapping[str, int], plan: Plan) -> None:
    """Raise `ValueError` for an axis that no weight has, one that the mesh lacks, and one that is there twice."""
    for axis, over in plan.items():
        names = (over,) if isinstance(over, str) else over
        if axis not in (*AXES, "*b"):
            raise ValueError(f"plan: there is no axis {axis!r}; the axes are {', '.join(AXES)}, and *b for the rows")
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"plan: {axis} is divided over the name of a mesh axis, got {over!r}; leave out an axis "
                             "that is not divided")
        if axis != "*b" and not isinstance(over, str):
            raise ValueError(f"plan: {axis} can be divided over one mesh axis, got {over!r}; only *b may have several")
        for name in names:
            if name not in mesh:
                raise ValueError(f"plan: {axis} is divided over {name!r}, and the mesh has {', '.join(mesh)}")
        if len(set(names)) < len(names):
            raise ValueError(f"plan: {axis} is divided over one mesh axis twice, {over!r}")


def check_mesh(mesh: Mapping[str, int], world: int | None = None) -> None:
    """Raise `ValueError` for a size below 1, and if there are not as many processes as the mesh has devices."""
    devices = math.prod(integer(f"mesh: {name}", size, 1) for name, size in mesh.items())
    if world is not None and devices != world:
        raise ValueError(f"a mesh of {_written(mesh)} has {devices} devices, and {world} processes run; choose sizes "
                         "whose product is the number of processes (torchrun --nproc-per-node)")


def _check_leaf(path: str, weight: Weight, mesh: Mapping[str, int], plan: Plan) -> None:
    """Raise `ValueError` if the plan cannot divide a leaf."""
    taken: dict[str, str] = {}
    for axis, size in zip(weight.axes.split(), weight.shape, strict=True):
        if (name := plan.get(axis)) is None:
            continue
        assert isinstance(name, str), "check_words has seen it"
        if name in taken:
            raise ValueError(f"plan: {path} has the axes {taken[name]} and {axis}, and {name!r} can divide one of them")
        taken[name] = axis
        if size % mesh[name]:
            raise ValueError(f"plan: {path} has {size} numbers along {axis}, and {mesh[name]} devices ({name}) cannot "
                             f"divide them evenly; choose a size of {name} that divides {size}")


def _written(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh.items())
