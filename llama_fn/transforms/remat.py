"""`remat`: the backward computes a function again instead of keeping what lies inside it, as `jax.checkpoint` does.

Around each of l layers, what is kept falls from everything that they compute to their l inputs, for one more forward
(Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from llama_fn import tree
from llama_fn.modes import compiling, forward_mode, under_dynamo
from llama_fn.private import is_wrapped, outside_of_dynamo
from llama_fn.transforms.tapped import Tapped

P = ParamSpec("P")
R = TypeVar("R")


def remat(f: Callable[P, R]) -> Callable[P, R]:
    """`f` with the same signature, results and derivatives of every order, which keeps its arguments alone.

    Legal inside and outside of `torch.func`'s transforms and inside `torch.compile`, for trees of any kind in and out.
    Three limits, of memory and not of results. `f` runs as it stands in forward mode (`jvp`, `jacfwd`, `hessian`: take
    a Hessian-vector product in reverse twice, `vjp(grad(loss))`); where the norms of per-sample gradients are measured
    in its weights (`per_sample_norms`, and the first backward of `clipped_sum`); and where an eager `f` closes over a
    tensor under a transform: pass it as an argument. (What a compiled one closes over becomes an argument by itself.)
    """

    def own(*args: Any, **kwargs: Any) -> R:
        # Each result a tensor of its own: where an argument is returned as it came, or one tensor twice, both
        # autograd.Function and dynamo lose gradients (torch 2.13).
        return tree.map(lambda x: x.view_as(x) if isinstance(x, Tensor) else x, f(*args, **kwargs))

    @functools.wraps(f)
    def computed_again(*args: Any, **kwargs: Any) -> R:
        if forward_mode() or any(isinstance(x, Tapped) for x in tree.leaves((args, kwargs))):
            return f(*args, **kwargs)
        if under_dynamo():
            return outside_of_dynamo(_in_graph, own, *args, **kwargs)
        with contextlib.suppress(_Outside, RuntimeError):  # what is wrong with f itself, the next line raises again
            return _call(own, _watched, args, kwargs)
        return f(*args, **kwargs)

    return computed_again


def _in_graph(f: Callable) -> Callable:
    """Dynamo hands over `f` as a graph, and what it closed over as arguments.

    Traced by dynamo itself, an `autograd.Function` under `torch.func` loses its backward, in silence (torch 2.13). A
    graph with transforms in it has their levels in it, and stays where it is.
    """
    nodes = (node for part in f.modules() if isinstance(part, GraphModule) for node in part.graph.nodes)
    if any("_increment_nesting" in str(node.target) for node in nodes):
        return f
    return lambda *args: _call(f, lambda run: run, args, {})


def _call(f: Callable, first: Callable[[Callable], Callable], args: tuple, kwargs: dict[str, Any]) -> Any:
    """`f` on trees as a `_Recomputed` function of their tensors; `first` wraps the run whose value is returned."""
    leaves, structure = tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    tensors, others = [leaves[i] for i in places], [None if isinstance(x, Tensor) else x for x in leaves]
    shape: tuple = ()

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        nonlocal shape
        args, kwargs = tree.unflatten(_filled(others, places, xs), structure)
        results, result_structure = tree.flatten(f(*args, **kwargs))
        at = [i for i, x in enumerate(results) if isinstance(x, Tensor)]
        shape = result_structure, at, [None if isinstance(x, Tensor) else x for x in results]
        return tuple(results[i] for i in at)

    results = _Recomputed.apply(run, first(run), *tensors)
    result_structure, at, rest = shape
    return tree.unflatten(_filled(rest, at, results), result_structure)


class _Recomputed(torch.autograd.Function):
    """`f(*xs)`, of tensors to a tuple of tensors, which keeps xs alone.

    Its pullback is another such function, of xs and the cotangents: the derivative of the derivative keeps no more, and
    an eager `torch.func.grad`, which records its backward, has nothing to record.
    """

    @staticmethod
    def forward(f: Callable, run: Callable, *xs: Tensor) -> tuple[Tensor, ...]:
        return run(*xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        ctx.f, _, *xs = inputs
        ctx.save_for_backward(*xs)
        ctx.inner = [x.requires_grad and not x.is_leaf for x in xs]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        f, xs = ctx.f, ctx.saved_tensors
        count = len(xs)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        cotangents = tuple(filter(_smooth, cotangents))
        if compiling():
            xs = _after(cotangents, xs, ctx.inner if any(ctx.inner) else map(_smooth, xs))

        def pullback(*both: Tensor) -> tuple[Tensor, ...]:
            xs, cotangents = both[:count], both[count:]

            def moved(*some: Tensor) -> tuple[Tensor, ...]:
                return tuple(filter(_smooth, f(*_filled(xs, wanted, some))))

            return torch.func.vjp(moved, *(xs[i] for i in wanted))[1](cotangents)

        gradients = _Recomputed.apply(pullback, pullback, *xs, *cotangents)
        return None, None, *_filled([None] * count, wanted, gradients)

    @staticmethod
    def vmap(info: Any, axes: tuple, f: Callable, run: Callable, *xs: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """The map of such a function is the function of the map."""
        f, run = (torch.vmap(g, axes[2:], randomness=info.randomness) for g in (f, run))
        return _Recomputed.apply(f, run, *xs), 0


def _after(cotangents: Sequence[Tensor], xs: Sequence[Tensor], which: Sequence[bool]) -> list[Tensor]:
    """xs, with those chosen made to depend on the cotangents, exactly and for next to nothing.

    Without it, the compiler, which sees forward and backward as one graph, begins to compute again long before the
    cotangents are there. Parameters are not chosen: a copy of them would cost more than it gives.
    """
    probes = [c.flatten()[0].isnan() for c in cotangents if c.numel()]
    if not probes:
        return list(xs)
    late = functools.reduce(torch.logical_or, probes)
    return [torch.where(late, x, x) if chosen else x for x, chosen in zip(xs, which, strict=True)]


class _Outside(BaseException):
    """`f` uses a tensor under a transform, or one that requires a gradient, which is not among its arguments."""


def _watched(run: Callable) -> Callable:
    def watched(*xs: Tensor) -> tuple[Tensor, ...]:
        with _Watch(xs):
            return run(*xs)

    return watched


class _Watch(TorchFunctionMode):
    """Raises `_Outside` where an operation takes an active tensor that is neither an argument nor a result of another.

    `torch.func` would take it for a constant, and its gradient would be zero, in silence.
    """

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        self.known = WeakIdKeyDictionary(dict.fromkeys(arguments))

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(_active(x) and x not in self.known for x in tree.leaves((args, kwargs))):
            raise _Outside
        result = func(*args, **kwargs)
        self.known.update((x, None) for x in tree.leaves(result) if _active(x))
        return result


def _active(x: Any) -> bool:
    return isinstance(x, Tensor) and (is_wrapped(x) or x.requires_grad)


def _smooth(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _filled(xs: Sequence, places: Sequence[int], new: Sequence) -> list:
    """xs with `new` at `places`."""
    filled = list(xs)
    for i, x in zip(places, new, strict=True):
        filled[i] = x
    return filled
