"""What a GPU's product of one row (`gpu_row`) takes with it: the gate or the sum that is made of its result."""

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def fuse(graph: Graph) -> None:
    """Let the products of one row in a graph that `make_fx` wrote do what is done with their results, and each know the
    weight that the next one reads. Within the fake mode of the graph's values.
    """
    graph.eliminate_dead_code()
    for product in _products(graph):
        _gated(graph, product)
    for product in _products(graph):
        _added(graph, product)
    for before, after in itertools.pairwise(_products(graph)):
        if (weight := _seen(after.args[0][0])).op == "placeholder":  # there before anything is computed
            before.update_kwarg("following", weight)


def _products(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if str(node.target) == "llama_fn.row.default"]


def _gated(graph: Graph, product: Node) -> None:
    """silu(W0 x) * W1 x, of which this product is one: the product of W0 and W1 says it itself."""
    x = _seen(product.args[2])
    if (found := _arguments(x, lambda gate, up: F.silu(gate) * up, 2)) is None:
        return
    gate, up = (_seen(node) for node in found)
    if gate.target is not operator.getitem or gate.args[0].target is not aten.split_with_sizes.default:
        return
    split, before = gate.args[0], gate.args[0].args[0]
    if before in _products(graph) and [gate.args, up.args] == [(split, 0), (split, 1)] and len(before.args[0]) == 2:
        _instead(graph, x, before, gated=True)


def _added(graph: Graph, product: Node) -> None:
    """x + W y: the product of W says it itself."""
    last = product
    while len(last.users) == 1 and (user := next(iter(last.users))).target in VIEWS:
        last = user
    if len(last.users) != 1 or user.target is not aten.add.Tensor or user.kwargs or user.args[1] is not last:
        return
    x = user.args[0]
    if isinstance(x, Node) and _alike(x.meta["val"], last.meta["val"]) and x.meta["val"].is_contiguous():
        with graph.inserting_before(user):
            x = _put(graph, aten.view.default, (x, list(product.meta["val"].shape)), {})
        _instead(graph, user, product, residual=x)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def _seen(node: Node) -> Node:
    """What this is a view of, of the same numbers in the same order."""
    return _seen(node.args[0]) if node.target in VIEWS else node


def _instead(graph: Graph, old: Node, product: Node, **more: Any) -> None:
    """In the place of a node, the product with more to do."""
    with graph.inserting_before(old):
        new = _put(graph, product.target, product.args, {**product.kwargs, **more})
        old.replace_all_uses_with(_put(graph, aten.view.default, (new, list(old.meta["val"].shape)), {}))
    graph.eliminate_dead_code()


def _put(graph: Graph, target: Callable, args: tuple, kwargs: dict[str, Any]) -> Node:
    node = graph.call_function(target, args, kwargs)
    args, kwargs = torch.fx.map_arg((args, kwargs), lambda x: x.meta["val"])
    node.meta["val"] = target(*args, **kwargs)
    return node


def _arguments(node: Node, f: Callable[..., Tensor], count: int) -> list[Node] | None:
    """The nodes of which this one is `f`, as it is traced; None if it is not. They are as many tensors of its shape."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    value = node.meta["val"]
    examples = [torch.empty_like(value) for _ in range(count)]
    pattern = make_fx(f, decomposition_table=select_decomp_table())(*examples).graph
    found: dict[Node, Node | None] = dict.fromkeys(pattern.find_nodes(op="placeholder"))

    def same(x: Any, wanted: Any) -> bool:
        if isinstance(wanted, Node) and wanted in found:
            found[wanted] = found[wanted] or x
            return isinstance(x, Node) and found[wanted] is x and _alike(x.meta["val"], value)
        if isinstance(wanted, Node):
            return (isinstance(x, Node) and (x.target, x.kwargs) == (wanted.target, wanted.kwargs)
                    and len(x.args) == len(wanted.args) and all(map(same, x.args, wanted.args)))
        return x == wanted

    result = next(iter(reversed(pattern.nodes))).args[0]
    return list(found.values()) if same(node, result) else None
