"""The laws of what crosses between devices: each map is its definition, linear, and its derivative its transpose."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meshes import FEW
from torch.fx.experimental.proxy_tensor import make_fx
from worlds import world

import llama_fn as lf
from llama_fn.mesh import collectives
from llama_fn.mesh.collectives import MeshAxis
from llama_fn.mesh.shard import sharding

# Of each map: whether its input and its output are the same on all devices, and its transpose.
MAPS = {"copied": (True, False, "summed"), "summed": (False, True, "copied"),
        "gathered": (False, True, "sliced"), "sliced": (True, False, "gathered"),
        "collected": (False, False, "scattered"), "scattered": (False, False, "collected")}
CUTS = ("sliced", "scattered")
MESHES = st.sampled_from([{"dp": 2}, {"dp": 4}, {"dp": 2, "tp": 2}])


class Case:
    """A map over one axis of a mesh, as one device sees it, with numbers that are added without rounding."""

    def __init__(self, name: str, mesh: dict[str, int], over: str, shape: tuple[int, ...], dim: int, seed: int):
        device = lf.mesh.make_mesh(mesh)
        (axis,) = sharding("d", device, {"d": over}).over
        assert isinstance(axis, MeshAxis)
        self.name, self.dim, self.axis, self.seed, self.shape = name, dim, axis, seed, shape
        self.others = sum(x * 100 for x in device.get_coordinate()) - 100 * axis.index  # the index along other axes

    def run(self, x: torch.Tensor, name: str | None = None) -> torch.Tensor:
        f, has_dim = getattr(collectives, name or self.name), (name or self.name) not in ("copied", "summed")
        return f(x, self.dim, self.axis) if has_dim else f(x, self.axis)

    def definition(self, xs: list[torch.Tensor], name: str | None = None) -> torch.Tensor:
        """What this device gets, if the devices have these inputs."""
        n, i = self.axis.size, self.axis.index
        return {"copied": lambda: xs[i],
                "summed": lambda: sum(xs),
                "gathered": lambda: torch.cat(xs, self.dim),
                "sliced": lambda: xs[i].chunk(n, self.dim)[i],
                "collected": lambda: torch.cat(xs, self.dim),
                "scattered": lambda: sum(xs).chunk(n, self.dim)[i]}[name or self.name]()

    def inputs(self, *more: int, name: str | None = None, salt: int = 0) -> list[torch.Tensor]:
        """The inputs of all devices along the axis; `more` axes come first."""
        name, shape = name or self.name, [*self.shape]
        shape[self.dim] *= self.axis.size if name in CUTS else 1
        same = MAPS[name][0]
        return [self.numbers([*more, *shape], 0 if same else i, salt) for i in range(self.axis.size)]

    def numbers(self, shape: list[int], index: int, salt: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(self.seed * 1000 + salt * 500 + self.others + index)
        return torch.randint(-9, 10, shape, generator=drawn).double()


def equal(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=0)


def values_and_transposes(*arguments):
    """For each map: is it its definition, and is its derivative its transpose; then both sides of the dot products."""
    sides = {}
    for name, (same, same_result, transpose) in MAPS.items():
        case = Case(name, *arguments)
        xs, ys = case.inputs(), case.inputs(name=transpose, salt=1)
        x, y = xs[case.axis.index], ys[case.axis.index]
        if name in ("gathered", "collected", "summed"):  # the cotangent has the shape of the result
            assert case.run(x).shape == y.shape
        result, pullback = torch.func.vjp(case.run, x)
        equal(result, case.definition(xs))
        equal(pullback(y)[0], case.definition(ys, transpose))
        equal(pullback(y)[0], case.run(y, transpose))
        twice, pullback_of_pullback = torch.func.vjp(lambda y: pullback(y)[0], y)  # noqa: B023
        equal(pullback_of_pullback(x)[0], result)
        # A number that is the same on all devices counts once.
        once = 1.0 if case.axis.index == 0 else 0.0
        sides[name] = (float((result * y).sum()) * (once if same_result else 1),
                       float((x * twice).sum()) * (once if same else 1))
    return sides


@st.composite
def arguments(draw):
    """A mesh, one of its axes, a shape without equal sizes, an axis of it, and a seed."""
    mesh = draw(MESHES)
    shape = draw(st.permutations([2, 3, 5]).map(lambda sizes: tuple(sizes[:draw(st.integers(1, 3))])))
    return (mesh, draw(st.sampled_from(sorted(mesh))), shape, draw(st.integers(-len(shape), len(shape) - 1)),
            draw(st.integers(0, 99)))


def devices(mesh):
    return torch.tensor([*mesh.values()]).prod().item()


@FEW
@given(arguments())
def test_each_map_is_its_definition_and_its_derivative_its_transpose(drawn):
    sides = world(devices(drawn[0]))(values_and_transposes, *drawn)
    for name in MAPS:
        left, right = (sum(side[name][i] for side in sides) for i in (0, 1))
        assert left == right, name


def mapped(*arguments):
    """Is `vmap`, nested and over other axes too, a loop; are derivatives under it those of the loop?"""
    for name, (_, _, transpose) in MAPS.items():
        case = Case(name, *arguments)
        x, y = case.inputs(4, 3)[case.axis.index], case.inputs(4, 3, name=transpose, salt=1)[case.axis.index]

        def pulled_back(x, y, run=case.run):
            return torch.func.vjp(run, x)[1](y)[0]

        rows = torch.stack([case.run(row) for row in x[0]])
        equal(torch.vmap(torch.vmap(case.run))(x), torch.stack([torch.vmap(case.run)(rows) for rows in x]))
        equal(torch.vmap(torch.vmap(case.run), 1, 1)(x), torch.vmap(torch.vmap(case.run))(x))
        equal(torch.vmap(case.run)(x[0]), rows)
        equal(torch.vmap(case.run, -1, -1)(x[0].movedim(0, -1)), rows.movedim(0, -1))
        beside = torch.vmap(lambda x, factor, run=case.run: run(x) * factor, (None, 0))(x[0, 0], torch.arange(3.0))
        equal(beside, torch.stack([rows[0] * i for i in range(3)]))
        equal(torch.vmap(pulled_back)(x[0], y[0]), torch.stack([pulled_back(*pair) for pair in zip(x[0], y[0],
                                                                                                  strict=True)]))
        equal(torch.vmap(pulled_back, (None, 0))(x[0, 0], y[0]), torch.stack([pulled_back(x[0, 0], row)
                                                                              for row in y[0]]))


@FEW
@given(arguments())
def test_vmap_is_a_loop(drawn):
    world(devices(drawn[0]))(mapped, *drawn)


def forward_mode(*arguments):
    """Is the derivative along a tangent the map of the tangent, under `vmap`, `grad` and `jvp` too?"""
    for name in MAPS:
        case = Case(name, *arguments)
        x, tangent = case.inputs(3)[case.axis.index], case.inputs(3, salt=1)[case.axis.index]

        def along(x, tangent, run=case.run):
            return torch.func.jvp(run, (x,), (tangent,))

        equal([*along(x[0], tangent[0])], [case.run(x[0]), case.run(tangent[0])])
        equal(torch.vmap(along)(x, tangent)[1], torch.vmap(case.run)(tangent))

        def energy(x, run=case.run):
            return run(x).square().sum()

        def hessian(x):
            return torch.func.grad(energy)(x)

        # Forward over reverse equals reverse over reverse.
        equal(torch.func.jvp(hessian, (x[0],), (tangent[0],))[1],
              torch.func.vjp(hessian, x[0])[1](tangent[0])[0])


@FEW
@given(arguments())
def test_forward_mode_is_the_map_of_the_tangent(drawn):
    world(devices(drawn[0]))(forward_mode, *drawn)


def traced(*arguments):
    """Are values and mapped gradients the same when traced by `make_fx`, and compiled as one graph?"""
    cases = [Case(name, *arguments) for name in MAPS]
    xs = [case.inputs(3)[case.axis.index] for case in cases]

    def energy(*xs):
        return sum(case.run(x).pow(3).sum() for case, x in zip(cases, xs, strict=True))

    f = torch.vmap(torch.func.grad(energy, argnums=tuple(range(len(xs)))))
    expected = f(*xs)
    equal(make_fx(f)(*xs)(*xs), expected)
    equal(torch.compile(f, fullgraph=True, backend="aot_eager")(*xs), expected)

    leaves = [x[0].clone().requires_grad_() for x in xs]
    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    equal([*torch.autograd.grad(compiled(*leaves), leaves)], [grad[0] for grad in expected])


@pytest.mark.slow
def test_traced_and_compiled_maps_are_the_maps():
    world(2)(traced, {"dp": 2}, "dp", (3, 4), 1, 7)


def largest_and_derivatives(mesh):
    (axis,) = sharding("d", lf.mesh.make_mesh(mesh), {"d": "tp"}).over
    x = torch.tensor([3.0, -5.0, 7.0]) * (-1) ** axis.index
    one = collectives.largest(x, axis)
    assert one.tolist() == [3, 5, 7]
    equal(torch.vmap(lambda x: collectives.largest(x, axis))(torch.stack([x, -x], 1).mT), torch.stack([one, one]))
    _, tangent = torch.func.jvp(lambda x: x.sum() + collectives.largest(x, axis), (x,), (torch.ones(3),))
    assert tangent.tolist() == [3, 3, 3]
    assert torch.func.grad(lambda x: (x + collectives.largest(x, axis)).sum())(x).tolist() == [1, 1, 1]


def test_the_largest_number_has_no_derivative():
    world(2)(largest_and_derivatives, {"tp": 2})
