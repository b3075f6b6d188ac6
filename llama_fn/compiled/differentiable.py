"""`differentiable`: a function of trees, compiled together with its derivative."""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from llama_fn import private_inductor
from llama_fn.compiled.inductor import by_inductor, compile_lock, prepared
from llama_fn.compiled.products import by_onednn
from llama_fn.compiled.trace import collect, rebuilt
from llama_fn.modes import autocast, gradients_enabled, traced, tracing_layers, transforms

R = TypeVar("R")
# Torch's `activation_memory_budget`: how much of its values a forward may save for the backward. At 1 the backward
# recomputes only what costs next to nothing, at 0 all that it can. At 0.8 a block saves 29 % less than at 1, and a
# step takes 2 % more time: the backward recomputes both norms and the gated product.
MEMORY_BUDGET = 0.8


def differentiable(f: Callable[..., R]) -> Callable[..., R]:
    """`f` of positional trees and its derivative for `torch.autograd`, compiled once per combination of shapes.

    As in `torch.compile`, forward and backward are cut out of one graph, and the forward saves only what the backward
    cannot cheaply compute again. Tracing takes a fifth of the time of `torch.compile`. All layers of a model share the
    compiled code. Where `f` is mapped, traced, differentiated by `torch.func` or not differentiated, it runs as it is.
    """
    known: dict[Hashable, _Compiled] = {}

    @functools.wraps(f)
    def called(*args: Any) -> Any:
        tensors: list[Tensor] = []
        rest: list[Any] = [torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()]
        collect(args, tensors, rest)
        needs_grad = [gradients_enabled() and x.requires_grad for x in tensors]
        if not any(needs_grad) or traced() or transforms() or autocast():
            return f(*args)
        tensors = [x.contiguous() for x in tensors]
        key = (*rest, *needs_grad, *((x.shape, x.dtype, x.device) for x in tensors))
        if (ready := known.get(key)) is None:
            ready = known[key] = _compiled(f, args, tensors, [i for i, one in enumerate(needs_grad) if one])
        return rebuilt(ready.result, iter(_Applied.apply(ready, *tensors)))

    return called


class _Compiled(NamedTuple):
    """A forward, from tensors to results and saved tensors; and a backward, from saved tensors and cotangents."""

    forward: Callable[[list[Tensor]], Sequence[Tensor]]
    backward: Callable[[list[Tensor]], Sequence[Tensor]]
    outputs: int  # how many of the forward's values are results
    needs_grad: list[int]  # the indices of the tensors whose gradients the backward returns
    result: Any  # the tree of results, with placeholders for its tensors


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ready: _Compiled, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = ready.forward([*tensors])
        ctx.ready, ctx.count = ready, len(tensors)
        ctx.save_for_backward(*values[ready.outputs:])
        return tuple(values[:ready.outputs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients: list[Tensor | None] = [None] * ctx.count
        values = ctx.ready.backward([*ctx.saved_tensors, *(x.contiguous() for x in cotangents)])
        for place, value in zip(ctx.ready.needs_grad, values, strict=True):
            gradients[place] = value
        return None, *gradients


@compile_lock()
def _compiled(f: Callable, args: tuple, tensors: list[Tensor], needs_grad: list[int]) -> _Compiled:
    inductor = private_inductor.inductor()
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake_mode = inductor.FakeTensorMode(shape_env=ShapeEnv())  # without a ShapeEnv, torch's on-disk cache is off
    result: Any = None

    def values(*numbers: Tensor) -> tuple[Tensor, ...]:
        nonlocal result
        found: list[Tensor] = []
        result = f(*rebuilt(args, iter(numbers)))
        collect((result,), found, [])
        result = rebuilt(result, itertools.repeat(torch.empty(0, device="cpu")))
        return tuple(found)

    def both(primals: list[Tensor], tangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        def of_needed(*needed: Tensor) -> tuple[Tensor, ...]:
            numbers = [*primals]
            for i, x in zip(needs_grad, needed, strict=True):
                numbers[i] = x
            return values(*numbers)

        outputs, pullback, *_ = torch.func.vjp(of_needed, *(primals[i] for i in needs_grad))
        return [*outputs], [*pullback(tuple(tangents))]

    primals = [fake_mode.from_tensor(x.detach(), static_shapes=True) for x in tensors]
    with torch.no_grad(), tracing_layers(), fake_mode:
        tangents = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in values(*primals)]
        joint = make_fx(both, decomposition_table=inductor.decompositions())(primals, tangents)
        _gather_again(joint.graph)
        with inductor.tracing(fake_mode), inductor.partitioning.patch(activation_memory_budget=MEMORY_BUDGET):
            forward, backward = inductor.partition(joint, [primals, tangents], num_fwd_outputs=len(tangents))
    run = _by_inductor(forward, primals, fake_mode, tensors[0])
    compiled_backward: list[Callable] = []

    def run_backward(values: list[Tensor]) -> Sequence[Tensor]:
        if not compiled_backward:  # compiled at the first call, when the strides of the saved tensors are known
            inputs = [fake_mode.from_tensor(x.detach(), static_shapes=True) for x in values]
            compiled_backward.append(_by_inductor(backward, inputs, fake_mode, values[0]))
        return compiled_backward[0](values)

    return _Compiled(run, run_backward, len(tangents), needs_grad, result)


def _gather_again(graph: Graph) -> None:
    """Let the backward gather weights again, which the forward gathered from other devices, instead of saving them.

    Saved, the weights of all layers would be whole on every device until the backward.
    """
    of_one, again = set(graph.find_nodes(op="placeholder")), set()  # computed from one argument; gathered from it
    for node in graph.nodes:
        if node.op == "call_function" and len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in of_one:
            of_one.add(node)
            # By the name: on a CPU the operator is that of `mesh/collectives.py`, and on a GPU torch's own.
            if "all_gather" in str(node.target) or node.all_input_nodes[0] in again:
                again.add(node)
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


@compile_lock()
def _by_inductor(graph: GraphModule, inputs: list[Tensor], fake_mode: Any, like: Tensor) -> Callable:
    by_onednn(graph)
    return by_inductor(graph, inputs, fake_mode, prepared(like, {}))
