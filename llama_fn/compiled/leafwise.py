"""`leafwise`: a function of trees that computes leaf by leaf, as an optimizer does, compiled once for all leaves.

The whole function is traced, and its graph is cut into pieces: one for each sum over a leaf, as in a norm, and one for
all results that are computed from a leaf. A piece starts from the leaves themselves, so it reads each of them once.
Pieces with the same operations are compiled once, as a loop for leaves of any size. The few single numbers between the
pieces (a norm, a learning rate) are computed by torch.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from llama_fn import private, private_inductor, tree
from llama_fn.compiled.inductor import compile_lock
from llama_fn.compiled.jit import donated
from llama_fn.compiled.meta_trace import meta_trace
from llama_fn.compiled.trace import compiled
from llama_fn.modes import plain, traced, tracing_layers

R = TypeVar("R")
COPY, SUM = torch.ops.aten.copy_.default, torch.ops.aten.sum.default
# A function of tensors, and the nodes that it reads and makes.
Step = tuple[Callable[..., Sequence[Tensor]], list[Node], list[Node]]


def leafwise(f: Callable[..., R], donate: str | Sequence[str] = ()) -> Callable[..., R]:
    """`f` of positional trees, compiled leaf by leaf; results overwrite the arguments that `donate` names."""
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    parameters = tuple(inspect.signature(f).parameters)
    known: dict[Hashable, Callable[[list[Tensor]], Any]] = {}
    loops: dict[Hashable, Callable] = {}  # one for all pieces with the same operations

    def run(*args: Any) -> Any:
        return donated({name: args[parameters.index(name)] for name in names}, f(*args))

    @functools.wraps(f)
    def called(*args: Any) -> Any:
        tensors, structure = tree.flatten(args)
        if traced() or not all(isinstance(x, Tensor) for x in tensors) or not plain(tensors):
            return f(*args)
        key = (torch.get_num_threads(), structure, *((x.shape, x.stride(), x.dtype, x.device) for x in tensors))
        if (ready := known.get(key)) is None:
            ready = known[key] = _program(run, structure, tensors, loops)
        return ready(tensors)

    return called


@compile_lock()
def _program(f: Callable, structure: Any, tensors: list[Tensor], loops: dict) -> Callable[[list[Tensor]], Any]:
    """`f` compiled for arguments like these, as a function of the list of their tensors."""
    graph, result = _traced(f, structure, tensors)
    placeholders = graph.find_nodes(op="placeholder")
    inputs = [node for node in placeholders if "constant" not in node.meta]
    constants = {node: node.meta["constant"] for node in placeholders if "constant" in node.meta}
    (values,) = next(iter(graph.find_nodes(op="output"))).args
    steps = _steps(graph, values, loops)

    def run(tensors: list[Tensor]) -> Any:
        known = constants | dict(zip(inputs, tensors, strict=True))
        for step, read, made in steps:
            known.update(zip(made, step(*(known[node] for node in read)), strict=True))
        return tree.unflatten([known[node] for node in values], result)

    return run


def _traced(f: Callable, structure: Any, tensors: list[Tensor]) -> tuple[Graph, Any]:
    """The graph of f, from the tensors of its arguments to those of its result; and the structure of the result."""
    result: Any = None

    def flat(*numbers: Tensor) -> list[Tensor]:
        nonlocal result
        values, result = tree.flatten(f(*tree.unflatten([*numbers], structure)))
        return values

    with tracing_layers():
        graph = meta_trace(flat, tensors)
    return private_inductor.inductor().same_once(graph), result


def _steps(graph: Graph, values: Sequence[Node], loops: dict) -> list[Step]:
    """The steps in order: single numbers as the graph has them, then each leaf's results, then writes by torch."""
    owners, steps, writes, made = _owners(graph), [], [], {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node in owners and _many(node):
            if node.target is COPY or node in values:
                made.setdefault(owners[node], []).append(node)
        elif node in owners:
            steps.append(_piece([node], owners, loops))
        else:
            (writes if node.target is COPY else steps).append(_by_torch(node))
    return [*steps, *(_piece(nodes, owners, loops) for nodes in made.values()), *writes]


def _owners(graph: Graph) -> dict[Node, Node]:
    """For each node that is computed from leaves, the leaf that it belongs to.

    Leaves that are arguments of the same node, such as a parameter and its gradient, count as one.
    """
    above: dict[Node, Node] = {}

    def owner(node: Node) -> Node:
        while above[node] is not node:
            node = above[node]
        return node

    for node in graph.nodes:
        if node.op == "placeholder" and _many(node):
            above[node] = node
        met = [owner(x) for x in node.all_input_nodes if x in above and _many(x)]
        if node.op == "call_function" and met:
            above[node] = met[0]
            for other in met[1:]:
                above[other] = met[0]
    return {node: owner(node) for node in above}


def _many(node: Node) -> bool:
    """Whether a node has more than one number. A single number is computed once, and a piece that uses it reads it."""
    return isinstance(node.meta["val"], Tensor) and node.meta["val"].numel() != 1


def _by_torch(node: Node) -> Step:
    read, operator = node.all_input_nodes, node.target
    assert callable(operator)

    def step(*tensors: Tensor) -> Sequence[Tensor]:
        known = dict(zip(read, tensors, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        return [operator(*args, **kwargs)]

    return step, read, [node]


def _piece(made: list[Node], owners: dict[Node, Node], loops: dict) -> Step:
    """The step that computes these nodes of one leaf, from arguments and single numbers, by one loop."""
    inside: dict[Node, None] = {}
    read: dict[Node, None] = {}

    def visit(node: Node) -> None:
        for x in node.all_input_nodes:
            if x.op == "placeholder" or x not in owners or not _many(x):
                read[x] = None
            elif x not in inside:
                visit(x)
        if node.target is not COPY:
            inside[node] = None

    for node in made:
        visit(node)
    inside |= dict.fromkeys(node for node in made if node.target is COPY)  # last: no node reads the old numbers then
    many, places, flat = [_many(x) for x in read], [*read], _by_number(inside, read)
    shapes_read = [(x.meta["val"].dtype, None if flat else (x.meta["val"].shape, x.meta["val"].stride())) for x in read]
    alike = loops.setdefault((_code(inside, places, made), flat, *many, *shapes_read), [])
    written = [places.index(node.all_input_nodes[0]) if node.target is COPY else None for node in made]
    shapes = [node.meta["val"].shape for node in made]

    def step(*tensors: Tensor) -> Sequence[Tensor]:
        given = [x.view(-1) if flat and one else x for x, one in zip(tensors, many, strict=True)]
        results = next((found for ready in alike if (found := ready(given)) is not None), None)
        if results is None:
            axes = [0 if flat and one else None for one in many]
            alike.append(compiled(_module(inside, places, made), tuple(given), axes))
            results = alike[-1](given)
        return [y.view(shape) if place is None else tensors[place]
                for y, shape, place in zip(results, shapes, written, strict=True)]

    return step, places, made


def _code(inside: Iterable[Node], read: list[Node], made: list[Node]) -> str:
    """What a piece computes, as text that is equal for equal pieces."""
    number = {node: f"x{i}" for i, node in enumerate((*read, *inside))}

    def argument(x: Any) -> Any:
        return number[x] if isinstance(x, Node) else x

    return str([(str(node.target), map_aggregate((node.args, node.kwargs), argument)) for node in inside] +
               [number[node] for node in made])


def _module(inside: Iterable[Node], read: list[Node], made: list[Node]) -> GraphModule:
    """A piece as a function of what it reads."""
    graph = Graph()
    copies = {node: graph.placeholder(f"x{i}") for i, node in enumerate(read)}
    for node in inside:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].name = f"y{len(copies)}"  # torch's cache on disk finds a graph by its code
    graph.output(tuple(copies[node] for node in made))
    return GraphModule({}, graph)


def _by_number(inside: dict[Node, None], read: dict[Node, None]) -> bool:
    """Whether a piece is elementwise up to sums, so that one loop serves leaves of any shape."""
    leaves = [x.meta["val"] for x in read if _many(x)]
    pointwise = all(node.target in (COPY, SUM) or private.computes_by_number(node.target) for node in inside)
    return pointwise and len({x.shape for x in leaves}) == 1 and all(x.is_contiguous() for x in leaves)
