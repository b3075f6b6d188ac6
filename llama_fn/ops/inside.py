"""Integers that index memory (tokens, targets, lengths, rows): one outside is an error before anything uses it.

Eager code reads the numbers at once. A graph reads them when it runs, by the operator `llama_fn::inside`: compiled code
for the CPU would end the whole process at such an index, since inductor's loops cannot raise. (`torch._assert_async`
has no batching rule, and its message cannot name a value.) On a GPU, which the host would have to wait for, and in an
exported program, which must not need this package, nothing reads them: there an index is clamped to the range, and the
result is NaN.
"""

import torch
from torch import Tensor

from llama_fn.modes import concrete, unread
from llama_fn.ops.operators import LIBRARY, define


def inside(x: Tensor, what: str, low: int, high: int, count: int = 1, after: Tensor | None = None) -> Tensor:
    """`x`, each of whose integers begins `count` indices that lie in [low, high).

    In a graph, what uses the result runs after the check, and the check runs after `after` is computed.
    Raises `ValueError` with the message of `check`.
    """
    if concrete(x):
        if x.numel():
            check(what, *min_max(x), low, high, count)
        return x
    return x if unread(x) else torch.ops.llama_fn.inside(x, what, low, high, count, after)


def min_max(integers: Tensor) -> tuple[int, int]:
    """The minimum and the maximum of integers that the host can read."""
    if (count := integers.numel()) == 1:
        return (number := int(integers.item())), number
    few = count <= 64  # reading all of them takes a third of the time of `aminmax` and two reads
    numbers = integers.flatten().tolist() if few else [int(x) for x in integers.aminmax()]
    return min(numbers), max(numbers)


def clamped(x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The nearest index in [low, high), and whether it differs from x."""
    index = x.clamp(low, high - 1)
    return index, index != x


def check(what: str, minimum: int, maximum: int, low: int, high: int, count: int = 1) -> None:
    """Raise `ValueError` if `minimum` or `maximum` does not begin `count` indices in [low, high)."""
    if minimum >= low and maximum + count <= high:
        return
    value = minimum if minimum < low else maximum
    if what == "row":
        raise ValueError(f"the cache has {high} rows, 0 to {high - 1}, and none is number {value}")
    if what == "length" and value < low:
        forked = ", where it was forked" if low else ""
        raise ValueError(f"a cache's length must be at least {low}{forked}, got {value}")
    if what == "length":
        raise ValueError(f"the cache is full: it has {high} slots, {value} are in use, and {count} more tokens "
                         f"came; make it with init_cache(..., max_len={value + count}) or more")
    remedy = {"token": "encode the text with the tokenizer that belongs to the model",
              "target": "what is not to be predicted needs a mask that is false there"}[what]
    raise ValueError(f"{what} {value} is outside the vocabulary of {high} tokens, 0 to {high - 1}; {remedy}")


def _read(x: Tensor, what: str, low: int, high: int, count: int, after: Tensor | None = None) -> Tensor:
    if x.numel():
        check(what, *min_max(x), low, high, count)
    return x.clone()  # an operator's result is never its argument


def _mapped(info: object, axes: tuple, *args: object) -> tuple[Tensor, int | None]:
    return torch.ops.llama_fn.inside(*args), axes[0]


define("inside(Tensor x, str what, SymInt low, SymInt high, SymInt count, Tensor? after) -> Tensor",
       lambda x, *_: torch.empty_like(x), CPU=_read)
torch.library.register_vmap("llama_fn::inside", _mapped, lib=LIBRARY)
