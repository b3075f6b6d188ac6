"""`remat` computes a function again in the backward, instead of keeping its intermediate results; ``jax.checkpoint``.

Around each of l layers, memory falls from all intermediate results to the l inputs, for the time of one more forward
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
    """The function with the same signature, results and derivatives of every order, which keeps only its arguments.

    The backward computes the function again (Chen et al. 2016; JAX's ``jax.checkpoint``). It may stand inside and
    outside of the transforms of ``torch.func`` and inside ``torch.compile``, and its arguments and results may be any
    trees.

    In three cases the function runs as it is, with the same results and no less memory. (1) In forward mode, as in
    ``jvp``, ``jacfwd`` and ``hessian``; for a Hessian-vector product, use reverse mode twice, ``vjp(grad(loss))``. (2)
    Where `per_sample_norms` or the first backward of `clipped_sum` measures norms in its weights. (3) In eager mode,
    where the function closes over a tensor under a transform: pass it as an argument.

    >>> grads = torch.func.grad(lf.loss)(params, tokens, layer=lf.remat(lf.block))
    """

    def own(*args: Any, **kwargs: Any) -> R:
        # Make each result a new tensor. Where `f` returns an argument, or one tensor twice, `autograd.Function` and
        # dynamo lose gradients (torch 2.13).
        return tree.map(lambda x: x.view_as(x) if isinstance(x, Tensor) else x, f(*args, **kwargs))

    @functools.wraps(f)
    def computed_again(*args: Any, **kwargs: Any) -> R:
        if forward_mode() or any(isinstance(x, Tapped) for x in tree.leaves((args, kwargs))):
            return f(*args, **kwargs)
        if under_dynamo():
            return outside_of_dynamo(_in_graph, own, *args, **kwargs)
        with contextlib.suppress(_Outside, RuntimeError):  # an error of `f` itself is raised again by the next line
            return _call(own, _watched, args, kwargs)
        return f(*args, **kwargs)

    return computed_again


def _in_graph(f: Any) -> Callable:
    """What dynamo calls with `f` as a graph, and with what `f` closed over as arguments.

    If dynamo traced the `autograd.Function` itself under `torch.func`, it would drop the backward without a word (torch
    2.13). A graph that has transforms in it depends on their levels, and runs as it is.
    """
    nodes = (node for part in f.modules() if isinstance(part, GraphModule) for node in part.graph.nodes)
    if any("_increment_nesting" in str(node.target) for node in nodes):
        return f
    return lambda *args: _call(f, lambda run: run, args, {})


def _call(f: Callable, first: Callable[[Callable], Callable], args: tuple, kwargs: dict[str, Any]) -> Any:
    """`f` on trees as a `_Recomputed` function of their tensors; `first` wraps the run whose results are returned."""
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
    """A function `f(*xs)` from tensors to a tuple of tensors, which keeps only xs.

    Its pullback is another such function, of xs and the cotangents. So a second derivative keeps no more either, and an
    eager `torch.func.grad`, which records the backward, has nothing to record.
    """

    @staticmethod
    def forward(f: Callable, run: Callable, *xs: Tensor) -> tuple[Tensor, ...]:
        return run(*xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.f, _, *xs = inputs
        ctx.save_for_backward(*xs)
        ctx.inner = [x.requires_grad and not x.is_leaf for x in xs]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        f, xs = ctx.f, ctx.saved_tensors
        count = len(xs)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        cotangents = tuple(filter(_differentiable, cotangents))
        if compiling():
            xs = _after(cotangents, xs, ctx.inner if any(ctx.inner) else [_differentiable(x) for x in xs])

        def pullback(*both: Tensor) -> tuple[Tensor, ...]:
            xs, cotangents = both[:count], both[count:]

            def moved(*some: Tensor) -> tuple[Tensor, ...]:
                return tuple(filter(_differentiable, f(*_filled(xs, wanted, some))))

            return torch.func.vjp(moved, *(xs[i] for i in wanted))[1](cotangents)

        gradients = _Recomputed.apply(pullback, pullback, *xs, *cotangents)
        return None, None, *_filled([None] * count, wanted, gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], int]:
        """The map of such a function is such a function of the mapped one."""
        f, run, *xs = args
        f, run = (torch.vmap(g, in_dims[2:], randomness=info.randomness) for g in (f, run))
        return _Recomputed.apply(f, run, *xs), 0


def _after(cotangents: Sequence[Tensor], xs: Sequence[Tensor], which: Sequence[bool]) -> list[Tensor]:
    """xs, where those chosen by `which` depend on the cotangents, with the same values and at next to no cost.

    The compiler sees forward and backward as one graph. Without this dependence, it computes again long before the
    cotangents are there, and memory is not saved. Parameters are not chosen: a copy of them would cost more than it
    saves.
    """
    probes = [c.flatten()[0].isnan() for c in cotangents if c.numel()]
    if not probes:
        return list(xs)
    probe = functools.reduce(torch.logical_or, probes)
    return [torch.where(probe, x, x) if chosen else x for x, chosen in zip(xs, which, strict=True)]


class _Outside(BaseException):
    """`f` uses a tensor that is not an argument of it, and that is under a transform or requires a gradient."""


def _watched(run: Callable) -> Callable:
    """`run`, which raises `_Outside` where it uses an active tensor that is not its argument."""
    def watched(*xs: Tensor) -> tuple[Tensor, ...]:
        with _Watch(xs):
            return run(*xs)

    return watched


class _Watch(TorchFunctionMode):
    """A mode that raises `_Outside` where an operation takes an active tensor that does not come from an argument.

    `torch.func` would take such a tensor for a constant, and its gradient would be zero without an error.
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
    """Whether a value is a tensor under a transform, or one that requires a gradient."""
    return isinstance(x, Tensor) and (is_wrapped(x) or x.requires_grad)


def _differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _filled(xs: Sequence, places: Sequence[int], new: Sequence) -> list:
    """The list xs with `new` at `places`."""
    filled = list(xs)
    for i, x in zip(places, new, strict=True):
        filled[i] = x
    return filled
