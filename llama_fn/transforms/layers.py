"""`jit_layers`: a step of the model, compiled by its layers."""

import contextlib
import functools
import inspect
import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx import Graph
from torch.nn import Parameter

from llama_fn.model.block import block
from llama_fn.model.transformer import forward, head
from llama_fn.shapes import traced, transforms
from llama_fn.transforms.jit import donated, has_compiler, no_compiler

P = ParamSpec("P")
R = TypeVar("R")

# A sum of products is to be one loop: inductor breaks an expression of more than 30 operations or 4 reads in two, and
# multiplies and adds apart. Headers compiled beforehand take six seconds, and two loops gain nothing by them.
OPTIONS = {"realize_opcount_threshold": 1000, "realize_reads_threshold": 1000,
           "cpp.enable_floating_point_contract_flag": "fast", "cpp_cache_precompile_headers": False,
           "size_asserts": False}  # each call looks first whether its tensors fit


def jit_layers(f: Callable[P, R] = forward, donate: str | Sequence[str] = "cache") -> Callable[P, R]:
    """`forward`, or a function of its arguments that hands on `layer` and `head`, compiled by its parts: all layers
    share one compiled block, so that the first call takes as long for 80 of them as for one. The cache is written in
    place if it is donated, and a step's work follows its length.

    Only values are compiled: what is differentiated, mapped or traced runs as it is. Where there is no C++ compiler, a
    warning says so, and all does.
    """
    if not has_compiler():
        warnings.warn(no_compiler(getattr(f, "__name__", "a step")), stacklevel=2)
        return f
    return functools.partial(f, layer=by_shape(block, donate, {"slots": 0, "cache": -2}), head=by_shape(head))


def by_shape(f: Callable[P, R], donate: str | Sequence[str] = (),
             dynamic: Mapping[str, int] = MappingProxyType({})) -> Callable[P, R]:
    """`f` of positional trees, traced and compiled for every combination of shapes, but that of an argument which is
    `dynamic`, the axis named may be of any size. `jit` does more, and takes more: five times as long to trace a layer,
    and 0.1 ms at each call to see what has changed.
    """
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    parameters = tuple(inspect.signature(f).parameters)
    axes = [dynamic.get(name) for name in parameters]
    known: dict[Hashable, list[Callable]] = {}

    @functools.wraps(f)
    def run(*args: Any) -> R:
        result = f(*args)
        given = {name: args[parameters.index(name)] for name in names if args[parameters.index(name)] is not None}
        return donated(given, result) if given else result

    @functools.wraps(f)
    def called(*args: Any) -> R:
        tensors: list[Tensor] = []
        rest: list[Any] = [torch.get_num_threads()]
        _part(args, tensors, rest)
        if not traced():
            alike = known.setdefault(tuple(rest), [])
            for ready in alike:
                if (result := ready(tensors)) is not None:
                    return result
            if _values(tensors):
                alike.append(compiled(run, args, axes))
                return alike[-1](tensors)
        return f(*args)

    return called


def _values(tensors: list[Tensor]) -> bool:
    """Whether these are plain numbers, and nothing but values is asked for."""
    if transforms() or torch._C._is_any_autocast_enabled():
        return False
    grad = torch.is_grad_enabled()
    return all(type(x) in (Tensor, Parameter) and not (grad and x.requires_grad) for x in tensors)


def compiled(f: Callable, args: tuple, axes: Sequence[int | None]) -> Callable[[list[Tensor]], Any]:
    """`f` for arguments such as these, each with its dynamic axis, as a function of their tensors; its result is None
    if these are not such ones.
    """
    # Whoever compiles pays their import: two seconds.
    from torch._C._dynamo.guards import TensorGuards
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    # Which instructions the processor has, the C++ compiler is asked beside the tracing: else a first start waits for it.
    threading.Thread(target=pick_vec_isa).start()

    tensors: list[Tensor] = []
    places: list[tuple[int, int]] = []  # of which tensor, and which axis
    for argument, axis in zip(args, axes, strict=True):
        _part((argument,), own := [], [])
        if axis is not None:
            places += [(len(tensors) + i, axis % x.ndim) for i, x in enumerate(own) if x.is_contiguous()]
        tensors += own
    loose = dict(places)

    shapes, result = ShapeEnv(), None
    imagined = FakeTensorMode(shape_env=shapes)
    fakes = [imagined.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[
        DimDynamic.DYNAMIC if axis == loose.get(i) else DimDynamic.STATIC for axis in range(x.ndim)]))
        for i, x in enumerate(tensors)]
    sizes = [fakes[i].shape[axis] for i, axis in places]

    def flat(*numbers: Tensor | int) -> list[Tensor]:
        nonlocal result
        values: list[Tensor] = []
        result = f(*_filled(args, iter(numbers[len(sizes):])))
        _part((result,), values, [])
        result = _filled(result, itertools.repeat(torch.empty(0)))
        return values

    # Sizes are inputs of their own, too: there torch's cache between processes looks whether a graph fits.
    inputs = [*sizes, *fakes]
    with torch.no_grad(), _compiling(), imagined:
        graph = make_fx(flat, decomposition_table=select_decomp_table())(*inputs)
    outside = _views_outside(graph.graph, inputs)
    with torch.no_grad(), V.set_fake_mode(imagined), config.patch(OPTIONS), \
            torch._guards.tracing(torch._guards.TracingContext(imagined)):
        run = compile_fx_inner(graph, inputs, is_inference=True)

    # What a tensor must be like; for None, anything.
    guards = TensorGuards(
        *tensors, dynamic_dims_sizes=[[None if loose.get(i) == axis else n for axis, n in enumerate(x.shape)]
                                      for i, x in enumerate(tensors)],
        dynamic_dims_strides=[[None if axis < loose.get(i, 0) else n for axis, n in enumerate(x.stride())]
                              for i, x in enumerate(tensors)])
    fitting: dict[tuple[int, ...], bool] = {}

    def called(tensors: list[Tensor]) -> Any:
        if not guards.check(*tensors) or not all(tensors[i].is_contiguous() for i, _ in places):
            return None
        sizes = tuple(tensors[i].shape[axis] for i, axis in places)
        if sizes not in fitting:
            fitting[sizes] = shapes.evaluate_guards_for_args(fakes, tensors)
        if not fitting[sizes]:
            return None
        numbers = [*sizes, *tensors]
        for i, dtype in outside.items():
            if numbers[i].storage_offset() * numbers[i].itemsize % dtype.itemsize:
                return None
            numbers[i] = numbers[i].view(dtype)
        return _filled(result, iter(run(numbers)))

    return called


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


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Within it, `torch.compiler.is_compiling()`: the kernels are those of a compiled step."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _part(values: tuple, tensors: list[Tensor], rest: list[Any]) -> None:
    """Append the tensors in values to the one list, and all else that a function of them can see to the other."""
    for x in values:
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, tuple):
            rest.extend((type(x), len(x)))
            _part(x, tensors, rest)
        else:
            rest.extend((type(x), x))


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with other tensors in its tensors' places."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        parts = [_filled(x, tensors) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
