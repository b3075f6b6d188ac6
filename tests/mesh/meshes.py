"""What the laws of sharded leaves are tried on: meshes, plans, configs that fit them, and the numbers of a rank."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st

import llama_fn as lf
from llama_fn.mesh.plan import PRESETS

MESHES = ({"dp": 2}, {"tp": 2}, {"dp": 4}, {"tp": 4}, {"dp": 2, "tp": 2}, {"dp": 1, "tp": 2})
OWN = ({"v": "tp"}, {"f": "tp"}, {"d": "tp"}, {"h": "dp", "*b": "dp"}, {"k": "dp", "*b": "dp"},
       {"*b": ("dp", "tp"), "d": "dp", "f": "tp"}, {"*b": ("tp", "dp"), "k": "tp"}, {})
# An example on two or four processes costs 20 times what one costs in a process, so there are a quarter as many.
FEW = settings(max_examples=max(4, settings().max_examples // 4))


class Case(NamedTuple):
    """A model, a mesh and a plan, as plain values that are sent to the ranks."""

    config: lf.Config
    mesh: Mapping[str, int]
    plan: Mapping[str, Any]
    seed: int = 0

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def whole_weights(self) -> bool:
        """Whether each rank has all weights. Gathered ones lie otherwise in memory, and rounding differs."""
        return not set(self.plan) - {"*b"}


def fits(plan: Mapping[str, Any], mesh: Mapping[str, int]) -> bool:
    return {name for over in plan.values() for name in ((over,) if isinstance(over, str) else over)} <= set(mesh)


@st.composite
def random_plans(draw, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Any plan for a mesh: some mesh axes, in any order, divide the rows, and each may divide axes that do not meet."""
    names, plan = [*mesh], {}
    if rows := draw(st.permutations(names).map(lambda order: tuple(order[:draw(st.integers(0, len(order)))]))):
        plan["*b"] = rows if len(rows) > 1 else rows[0]
    for name in names:
        if axis := draw(st.sampled_from([x for x in (None, "k", "h", "d") if x not in plan])):
            plan[axis] = name
    for axis in "fv":
        if name := draw(st.sampled_from([x for x in (None, *names) if x is None or plan.get("d") != x])):
            plan[axis] = name
    return plan


@st.composite
def cases(draw, meshes=MESHES, rows: bool = True) -> Case:
    """A case whose axes all differ in size where the mesh allows it; with `rows` False, no plan divides the rows."""
    mesh = draw(st.sampled_from(meshes))
    n = max(mesh.values())
    known = [plan for plan in (*PRESETS.values(), *OWN) if fits(plan, mesh)]
    plan = draw(st.sampled_from(known) | random_plans(mesh))
    if not rows:
        plan = {axis: over for axis, over in plan.items() if axis != "*b"}
    k, g, layers = draw(st.sampled_from([(4, 2, 3), (4, 3, 2)] if n == 4 else [(2, 3, 1), (4, 3, 2), (2, 5, 3)]))
    h = 8 if n == 4 else draw(st.sampled_from([x for x in (6, 8) if x != k * g]))
    f, v = (n * draw(st.integers(5, 9)) for _ in "fv")
    config = lf.Config(dim=k * g * h, n_layers=layers, n_heads=k * g, n_kv_heads=k, vocab_size=v if v != f else v + n,
                       hidden_dim=f, max_seq_len=64)
    return Case(config, mesh, plan, draw(st.integers(0, 99)))


@functools.cache
def _mesh(sizes: tuple[tuple[str, int], ...]) -> Any:
    return lf.mesh.make_mesh(dict(sizes))


class Setting:
    """A case on a rank: the whole model and rows, as one device has them, and this rank's parts."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64, rows: int = 4, count: int = 7):
        from strategies import random_params, token_rows

        self.case, self.config = case, case.config
        self.device_mesh = _mesh(tuple(case.mesh.items()))
        self.params = random_params(case.config, lf.random.key(case.seed), dtype)
        self.tokens = token_rows(case.config, rows, count, seed=case.seed)
        self.mask = lf.random.uniform(lf.random.key(case.seed + 1), (rows, count)) < 0.7
        self.segments = (lf.random.uniform(lf.random.key(case.seed + 2), (rows, count)) < 0.3).long().cumsum(-1)
        self.parts = self.shard(self.params)

    def shard(self, whole: Any) -> Any:
        return lf.mesh.shard(whole, self.device_mesh, self.case.plan)

    def equal(self, x: Any, y: Any, atol: float = 1e-9) -> None:
        """Parts x are y when unsharded: up to the rounding of sums in another order, or bit for bit if atol is 0."""
        x = lf.mesh.unshard(x)
        assert lf.tree.structure(x) == lf.tree.structure(y)
        torch.testing.assert_close(lf.tree.leaves(x), lf.tree.leaves(y), rtol=atol, atol=atol, equal_nan=True)
