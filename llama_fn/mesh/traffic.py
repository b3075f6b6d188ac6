"""The bytes that one device sends, counted from the collectives that run.

By one convention, that of a ring: a device passes every piece of a tensor on but one, so that of n bytes over p devices
an all-gather and a reduce-scatter send (p - 1)/p n bytes a device, where n is the whole tensor, and an all-reduce,
which is one after the other, twice as many (Thakur et al. 2005, "Optimization of collective communication operations in
MPICH"; nccl-tests calls these factors "bus bandwidth").
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from llama_fn.private import DispatchMode

Traffic = dict[tuple[str, str], float]  # the bytes that a device sends, by the kind of collective and the mesh axis
RING = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}  # how often a piece goes round the ring


def sent(kind: str, size: float, devices: int) -> float:
    """The bytes that a device sends in a collective of a whole tensor of `size` bytes."""
    return RING[kind] * size * (devices - 1) / devices


@contextmanager
def counted(mesh: DeviceMesh) -> Iterator[Traffic]:
    """Count the bytes that this device sends over a mesh, eagerly or in compiled steps, within a ``with`` statement.

    The result maps a kind of collective and a mesh axis to bytes.

    >>> with lf.mesh.counted(mesh) as sent:
    ...     grads = torch.func.grad(lf.loss)(params, rows)
    >>> total = sum(sent.values())
    """
    traffic: Traffic = {}
    with _Counting(mesh, traffic):
        yield traffic


class _Counting(DispatchMode):
    """Sees every operator that runs, those of compiled code included, and adds up what the collectives send."""

    def __init__(self, mesh: DeviceMesh, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic
        self.axes = {mesh.get_group(i).group_name: (name, mesh.size(i))
                     for i, name in enumerate(mesh.mesh_dim_names or ()) if mesh.size(i) > 1}

    def __torch_dispatch__(self, f: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = next((kind for kind in RING if f.overloadpacket.__name__.startswith(kind.replace("-", "_"))), None)
        ours_or_torchs = f.namespace in ("_c10d_functional", "llama_fn")
        if ours_or_torchs and known and (axis := self.axes.get(args[-1])):  # the last is the group
            name, devices = axis
            tensors = [args[0]] if isinstance(args[0], Tensor) else args[0]
            size = sum(x.nbytes for x in tensors) * (devices if known == "all-gather" else 1)
            self.traffic[known, name] = self.traffic.get((known, name), 0.0) + sent(known, size, devices)
        return f(*args, **(kwargs or {}))
