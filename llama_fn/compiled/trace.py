"""`compiled`: a function of trees, traced for certain shapes and given to inductor."""

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.nn import Parameter

from llama_fn import private
from llama_fn.compiled.inductor import ONE_LOOP, prepared, undisturbed
from llama_fn.modes import tracing_layers, transforms
from llama_fn.ops.cpu import build as avx2
from llama_fn.private import autocast


@undisturbed()
def compiled(f: Callable, args: tuple, axes: Sequence[int | None],
             cpu: Mapping[str, Any] = ONE_LOOP) -> Callable[[list[Tensor]], Any]:
    """`f` for arguments such as these, each with its dynamic axis, as a function of their tensors; its result is None
    if these are not such ones. `cpu` are inductor's options there, beside those that are always set.
    """
    # Whoever compiles pays their import: two seconds.
    inductor = private.inductor()
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, is_concrete_int

    tensors: list[Tensor] = []
    places: list[tuple[int, int]] = []  # of which tensor, and which axis
    for argument, axis in zip(args, axes, strict=True):
        part((argument,), own := [], [])
        if axis is not None:
            places += [(len(tensors) + i, axis % x.ndim) for i, x in enumerate(own) if x.is_contiguous()]
        tensors += own
    loose = dict(places)
    options = prepared(tensors[0], cpu)

    shapes, result = ShapeEnv(), None
    imagined = inductor.FakeTensorMode(shape_env=shapes)
    fakes = [imagined.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[
        DimDynamic.DYNAMIC if axis == loose.get(i) else DimDynamic.STATIC for axis in range(x.ndim)]))
        for i, x in enumerate(tensors)]
    sizes = [fakes[i].shape[axis] for i, axis in places]

    def flat(*numbers: Tensor | int) -> list[Tensor]:
        nonlocal result
        values: list[Tensor] = []
        result = f(*filled(args, iter(numbers[len(sizes):])))
        part((result,), values, [])
        result = filled(result, itertools.repeat(torch.empty(0, device="cpu")))
        return values

    # Sizes are inputs of their own, too: there torch's cache between processes looks whether a graph fits.
    inputs = [*sizes, *fakes]
    with torch.no_grad(), tracing_layers(), imagined:
        graph = make_fx(flat, decomposition_table=inductor.decompositions())(*inputs)
    # Queries, keys and values take the same rows, laid out in the same way.
    graph.graph = inductor.same_once(graph.graph)
    outside = _views_outside(graph.graph, inputs)
    graph.recompile()  # torch's cache between processes knows a graph by its code
    with torch.no_grad(), inductor.set_fakes(imagined), inductor.config.patch(options), \
            inductor.tracing(imagined):
        run = inductor.compile(graph, inputs, is_inference=True)
    avx2.ready(graph.graph)

    # What was asked of a size may have decided it.
    alike = _alike(tensors, {i: axis for i, axis in loose.items() if not is_concrete_int(fakes[i].shape[axis])})
    fitting: dict[tuple[int, ...], bool] = {}
    viewed = _viewer()

    def called(tensors: list[Tensor]) -> Any:
        if not alike(*tensors) or not all(tensors[i].is_contiguous() for i, _ in places):
            return None
        sizes = tuple(tensors[i].shape[axis] for i, axis in places)
        if sizes not in fitting:
            fitting[sizes] = shapes.evaluate_guards_for_args(fakes, tensors)
        if not fitting[sizes]:
            return None
        numbers = [*sizes, *tensors]
        for i, dtype in outside.items():
            if (other := viewed(numbers[i], dtype)) is None:
                return None
            numbers[i] = other
        return filled(result, iter(run(numbers)))

    return called


def _alike(tensors: list[Tensor], loose: Mapping[int, int]) -> Callable[..., bool]:
    """Whether other tensors have the types, dtypes, devices, sizes and strides of these, and are wrapped by as many
    transforms: any size, where a tensor is loose in an axis, and in the axes before any stride.
    """
    sizes = [[None if axis == loose.get(i) else n for axis, n in enumerate(x.shape)] for i, x in enumerate(tensors)]
    strides = [[None if axis < loose.get(i, 0) else n for axis, n in enumerate(x.stride())]
               for i, x in enumerate(tensors)]
    return private.inductor().TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _views_outside(graph: Graph, inputs: list[Any]) -> dict[int, torch.dtype]:
    """Have the inputs that are looked at as another dtype, bytes as words, come as that: inductor leaves such a view to
    torch, which ends a loop and takes as long as three. Which inputs, and what they come as.
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


def _viewer() -> Callable[[Tensor, torch.dtype], Tensor | None]:
    """A tensor's memory as another dtype, or None if it begins within a number of that. A view is made once for as long
    as the tensor lives: to make seven for each layer anew takes 1 ms a step.
    """
    views: dict[int, tuple[weakref.ref, Tensor]] = {}

    def viewed(x: Tensor, dtype: torch.dtype) -> Tensor | None:
        place = id(x)
        known = views.get(place)
        if known is None or known[0]() is not x or known[1].data_ptr() != x.data_ptr():
            if x.storage_offset() * x.itemsize % dtype.itemsize:
                return None
            known = weakref.ref(x, lambda _: views.pop(place, None)), x.detach().view(dtype)
            views[place] = known
        return known[1]

    return viewed


def part(values: tuple, tensors: list[Tensor], rest: list[Any]) -> None:
    """Append the tensors in values to the one list, and all else that a function of them can see to the other."""
    for x in values:
        kind = type(x)  # to ask of what is no tensor whether it is one takes 0.3 us
        if kind is Tensor:
            tensors.append(x)
        elif issubclass(kind, tuple):
            rest += kind, len(x)
            part(x, tensors, rest)
        elif isinstance(x, Tensor):
            tensors.append(x)
        else:
            rest += kind, x


def plain(tensors: list[Tensor]) -> bool:
    """Whether these are numbers, and nothing but values is asked for."""
    if transforms() or autocast():
        return False
    grad = torch.is_grad_enabled()
    return all(type(x) in (Tensor, Parameter) and not (grad and x.requires_grad) for x in tensors)


def filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with other tensors in its tensors' places."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        parts = [filled(x, tensors) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
