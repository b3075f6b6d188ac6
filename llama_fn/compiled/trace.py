"""`compiled`: a function of trees, traced for arguments of certain shapes and compiled by inductor."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from llama_fn import private_inductor
from llama_fn.compiled.inductor import ONE_LOOP, by_inductor, compile_lock, prepared
from llama_fn.modes import tracing_layers
from llama_fn.ops.cpu import build

MAX_SIZES = 4096  # the most sizes for which a compiled function remembers whether its graph fits them


@compile_lock()
def compiled(f: Callable, args: tuple, axes: Sequence[int | None],
             cpu: Mapping[str, Any] = ONE_LOOP) -> Callable[[list[Tensor]], Any]:
    """`f` compiled for arguments like these, as a function of the list of their tensors.

    That function returns None for tensors of other dtypes, devices, sizes or strides. `axes` has each argument's
    dynamic axis, whose size may vary, or None. `cpu` are options for inductor on a CPU, in addition to those that are
    always set.
    """
    # These imports take two seconds, so they wait until something is compiled.
    inductor = private_inductor.inductor()
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, is_concrete_int

    tensors: list[Tensor] = []
    places: list[tuple[int, int]] = []  # the dynamic axes: which tensor, and which of its axes
    for argument, axis in zip(args, axes, strict=True):
        own = tensors_of(argument)
        if axis is not None:
            places += [(len(tensors) + i, axis % x.ndim) for i, x in enumerate(own) if x.is_contiguous()]
        tensors += own
    dynamic = dict(places)
    ready = prepared(tensors[0], cpu)

    shapes, result = ShapeEnv(), None
    fake_mode = inductor.FakeTensorMode(shape_env=shapes)
    fakes = [fake_mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[
        DimDynamic.DYNAMIC if axis == dynamic.get(i) else DimDynamic.STATIC for axis in range(x.ndim)]))
        for i, x in enumerate(tensors)]
    sizes = [fakes[i].shape[axis] for i, axis in places]

    def flat(*numbers: Tensor | int) -> list[Tensor]:
        nonlocal result
        result = f(*rebuilt(args, iter(numbers[len(sizes):])))
        values = tensors_of(result)
        result = rebuilt(result, itertools.repeat(torch.empty(0, device="cpu")))
        return values

    # The sizes are inputs, too: torch's cache on disk uses them to decide whether a stored graph fits.
    inputs = [*sizes, *fakes]
    with torch.no_grad(), tracing_layers(), fake_mode:
        graph = make_fx(flat, decomposition_table=inductor.decompositions())(*inputs)
    # Merge equal nodes: queries, keys and values rearrange the same rows in the same way.
    graph.graph = inductor.same_once(graph.graph)
    outside = _views_outside(graph.graph, inputs)
    graph.recompile()  # torch's cache on disk finds a graph by its code
    run = by_inductor(graph, inputs, fake_mode, ready)
    build.load_for_graph(graph.graph)

    # A condition on a dynamic size may have made it a constant during tracing.
    fits = alike(tensors, {i: axis for i, axis in dynamic.items() if not is_concrete_int(fakes[i].shape[axis])})
    fitting: dict[tuple[int, ...], bool] = {}  # sizes, and whether the graph's conditions on sizes hold for them

    def called(tensors: list[Tensor]) -> Any:
        if not fits(*tensors) or not all(tensors[i].is_contiguous() for i, _ in places):
            return None
        sizes = tuple(tensors[i].shape[axis] for i, axis in places)
        if (fitted := fitting.get(sizes)) is None:
            if len(fitting) >= MAX_SIZES:
                fitting.clear()
            fitted = fitting[sizes] = shapes.evaluate_guards_for_args(fakes, tensors)
        if not fitted:
            return None
        numbers: list[Any] = [*sizes, *tensors]
        for i, dtype in outside.items():
            if numbers[i].storage_offset() * numbers[i].itemsize % dtype.itemsize:
                return None  # it is not aligned to the wider dtype
            numbers[i] = numbers[i].view(dtype)
        return rebuilt(result, iter(run(numbers)))

    return called


def alike(tensors: list[Tensor], dynamic: Mapping[int, int] = MappingProxyType({})) -> Callable[..., bool]:
    """A function of other tensors: whether they have the types, dtypes, devices, sizes and strides of these.

    They must also be wrapped by the same transforms, and require gradients where these do. Tensor i may have any size
    in its axis `dynamic[i]`, and any stride in the axes before that one.
    """
    sizes = [[None if axis == dynamic.get(i) else n for axis, n in enumerate(x.shape)] for i, x in enumerate(tensors)]
    strides = [[None if axis < dynamic.get(i, 0) else n for axis, n in enumerate(x.stride())]
               for i, x in enumerate(tensors)]
    guards = private_inductor.tensor_guards()(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards.check


def _views_outside(graph: Graph, inputs: list[Any]) -> dict[int, torch.dtype]:
    """Change the graph: an input that it views as another dtype becomes an input of that dtype.

    Weights of 8 and 4 bits are read as wider words. Inductor would call torch for such a view, which ends a fused loop
    and takes as long as three loops. The result maps the indices of these inputs to their new dtypes.
    """
    view, as_dtype = torch.ops.aten.view.default, torch.ops.aten.view.dtype
    places, outside = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}, {}
    for node in graph.find_nodes(op="call_function", target=as_dtype):
        source = node.args[0]
        while source.target is view and len(source.users) == 1:
            source = source.args[0]
        if source not in places or len(source.users) > 1:
            continue
        place, outside[places[source]] = places[source], node.args[1]
        inputs[place] = source.meta["val"] = inputs[place].view(node.args[1])
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(view, (source, list(node.meta["val"].shape))))
    graph.eliminate_dead_code()
    return outside


def collect(values: tuple, tensors: list[Tensor], rest: list[Any]) -> None:
    """Append the tensors in `values` to `tensors`, and everything else that a function can see to `rest`."""
    for x in values:
        kind = type(x)  # comparing types saves the 0.3 us of an `isinstance` that fails
        if kind is Tensor:
            tensors.append(x)
        elif issubclass(kind, tuple):
            rest += kind, len(x)
            collect(x, tensors, rest)
        elif isinstance(x, Tensor):
            tensors.append(x)
        else:
            rest += kind, x


def tensors_of(*values: Any) -> list[Tensor]:
    """The tensors in trees of tuples, in order."""
    tensors: list[Tensor] = []
    collect(values, tensors, [])
    return tensors


def rebuilt(value: Any, tensors: Iterator[Any]) -> Any:
    """The value with each of its tensors replaced by the next one of `tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        parts = [rebuilt(x, tensors) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
