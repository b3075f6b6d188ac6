"""`meta_trace`: the graph of a function that computes with few kinds of operators on very many tensors."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from llama_fn.private import DispatchMode


def meta_trace(f: Callable[..., list[Tensor]], tensors: list[Tensor]) -> Graph:
    """The graph of `f` for tensors like these. ``node.meta["val"]`` is a meta tensor of the node's shape and dtype.

    A tensor that `f` reads and that is not among its arguments becomes one more argument of the graph, whose value is
    ``node.meta["constant"]``. All arguments lie on one device; an `f` that asks for it is told "meta".

    Torch's ``make_fx`` makes the same graph in 2.4 s instead of 0.9 s, for AdamW on the 218 leaves of a model of 24
    layers.
    """
    graph = Graph()
    nodes: dict[int, Node] = {}  # of each meta tensor, by its id: the nodes keep the tensors, so no id is used again
    constants: dict[int, Node] = {}  # of each tensor that is not an argument, by its id
    arguments = [_meta(x) for x in tensors]

    def name(node: Node, x: Any) -> Any:
        """Remember that x is the value of a node. What was made on another device is a meta tensor from now on."""
        if isinstance(x, tuple | list):
            node.meta["val"] = x
            return type(x)(name(graph.call_function(operator.getitem, (node, i)), one) for i, one in enumerate(x))
        x = _meta(x) if isinstance(x, Tensor) and not x.is_meta else x
        node.meta["val"] = x
        nodes[id(x)] = node
        return x

    def known(x: Any) -> Any:
        """The meta tensor of a tensor that is not an argument, and x itself for all else."""
        if not isinstance(x, Tensor) or x.is_meta:
            return x
        if id(x) not in constants:
            with graph.inserting_before(next(iter(graph.nodes))):
                constants[id(x)] = graph.placeholder(f"constant{len(constants)}")
            constants[id(x)].meta["constant"] = x
            name(constants[id(x)], x)
        return constants[id(x)].meta["val"]

    def node_of(x: Any) -> Any:
        if isinstance(x, torch.device) and x.type == "meta":
            return tensors[0].device
        return nodes[id(x)] if isinstance(x, Tensor) else x

    class Recorder(DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            args, kwargs = map_aggregate((args, kwargs or {}), known)
            node = graph.call_function(func, *map_aggregate((args, kwargs), node_of))
            return name(node, func(*args, **kwargs))

    for i, x in enumerate(arguments):
        name(graph.placeholder(f"x{i}"), x)
    with torch.no_grad(), Recorder():
        results = f(*arguments)
    graph.output(tuple(node_of(known(x)) for x in results))
    return graph


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
