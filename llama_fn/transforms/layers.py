"""`jit_layers`: a step of the model, compiled by its layers."""

import contextlib
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from llama_fn.model.block import block
from llama_fn.model.transformer import forward, head
from llama_fn.shapes import traced, transforms
from llama_fn.transforms.jit import donated, has_compiler, no_compiler

P = ParamSpec("P")
R = TypeVar("R")

# A sum of products is to be one loop: inductor breaks an expression of more than 30 operations or 4 reads in two, and
# multiplies and adds apart.
OPTIONS = {"realize_opcount_threshold": 1000, "realize_reads_threshold": 1000,
           "cpp.enable_floating_point_contract_flag": "fast"}


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


class Compiled(NamedTuple):
    """A function compiled for arguments of certain shapes, and whether these arguments are such ones."""

    run: Callable[..., tuple]  # of the dynamic sizes, then the tensors
    sizes: list[tuple[int, int]]  # of which tensor, and which axis
    fits: Callable[[list[Tensor]], bool]
    result: Any  # with a tensor in the place of each


def by_shape(f: Callable[P, R], donate: str | Sequence[str] = (),
             dynamic: Mapping[str, int] = MappingProxyType({})) -> Callable[P, R]:
    """`f` of positional trees, traced and compiled for every combination of shapes, but that of an argument which is
    `dynamic`, the axis named may be of any size. `jit` does more, and takes more: five times as long to trace a layer,
    and 0.1 ms at each call to see what has changed.
    """
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    parameters = tuple(inspect.signature(f).parameters)
    axes = [dynamic.get(name) for name in parameters]
    known: dict[Hashable, Compiled] = {}
    alike: dict[Hashable, list[Compiled]] = {}  # but for the sizes of dynamic axes

    @functools.wraps(f)
    def run(*args: Any) -> R:
        result = f(*args)
        given = {name: args[parameters.index(name)] for name in names if args[parameters.index(name)] is not None}
        return donated(given, result) if given else result

    @functools.wraps(f)
    def called(*args: Any) -> R:
        tensors: list[Tensor] = []
        facts = _facts(args, tensors)
        if not _values(tensors):
            return f(*args)
        key = facts, torch.get_num_threads()
        if key not in known:
            loose = tuple(_facts(arg, [], axis) for arg, axis in zip(args, axes, strict=True))
            family = alike.setdefault((loose, torch.get_num_threads()), [])
            fitting = [ready for ready in family if ready.fits(tensors)]
            if not fitting:
                fitting = [compiled(run, args, axes)]
                family.extend(fitting)
            known[key] = fitting[0]
        ready = known[key]
        sizes = [tensors[place].shape[axis] for place, axis in ready.sizes]
        return _filled(ready.result, iter(ready.run(*sizes, *tensors)))

    return called


def _values(tensors: list[Tensor]) -> bool:
    """Whether these are plain numbers, and nothing but values is asked for."""
    if traced() or transforms() or torch._C._is_any_autocast_enabled():
        return False
    grad = torch.is_grad_enabled()
    return all(type(x) in (Tensor, Parameter) and not (grad and x.requires_grad) for x in tensors)


def compiled(f: Callable, args: tuple, axes: Sequence[int | None]) -> Compiled:
    """`f` for arguments such as these, each with its dynamic axis."""
    # Whoever compiles pays their import: two seconds.
    from torch._inductor import standalone_compile
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    shapes, result, place = ShapeEnv(), None, torch.empty(0)
    imagined = FakeTensorMode(shape_env=shapes)

    def fake(x: Tensor, axis: int | None) -> Tensor:
        sizes = [DimDynamic.STATIC] * x.ndim
        if axis is not None:
            sizes[axis] = DimDynamic.DYNAMIC
        return imagined.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    def flat(*numbers: Tensor | int) -> list[Tensor]:
        nonlocal result
        values: list[Tensor] = []
        result = f(*_filled(args, iter(numbers[len(sizes):])))
        _facts(result, values)
        result = _filled(result, itertools.repeat(place))
        return values

    places: list[tuple[Tensor, int | None]] = []
    for argument, axis in zip(args, axes, strict=True):
        _facts(argument, own := [])
        places.extend((x, axis) for x in own)
    fakes = [fake(*place) for place in places]
    # As numbers of their own, too: that is where torch's cache between processes looks whether a graph fits.
    sizes = [(i, axis) for i, (_, axis) in enumerate(places) if axis is not None]
    inputs = [*[fakes[i].shape[axis] for i, axis in sizes], *fakes]
    with torch.no_grad(), _compiling(), imagined:
        graph = make_fx(flat)(*inputs)
    # Of integers, a layer is eight loops and views between them: called from C++ they are 6 % faster. Of floats, which
    # are one loop, it would be 1 %, and compiling takes four seconds more.
    of_integers = any(x.dtype in (torch.int8, torch.uint8) for x in fakes)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.clear()  # or inductor, for C++, would take them for inputs without their sizes
    with torch._guards.tracing(torch._guards.TracingContext(imagined)):
        run = standalone_compile(graph, inputs, dynamic_shapes="from_tracing_context",
                                 options={"config_patches": OPTIONS | {"cpp_wrapper": of_integers}})
    return Compiled(run, sizes, lambda tensors: shapes.evaluate_guards_for_args(fakes, tensors), result)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Within it, `torch.compiler.is_compiling()`: the kernels are those of a compiled step."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _facts(value: Any, tensors: list[Tensor], axis: int | None = None) -> Hashable:
    """All that a compiled function is compiled for, hashable; if there is an `axis`, whatever its size is. The tensors
    go into the list.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        if axis is None or not value.is_contiguous():
            return value.shape, value.stride(), value.dtype, value.device
        return value.shape[:axis], value.shape[axis:][1:], value.dtype, value.device
    if isinstance(value, tuple):
        return type(value), *[_facts(x, tensors, axis) for x in value]
    return value


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with other tensors in its tensors' places."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        parts = [_filled(x, tensors) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
