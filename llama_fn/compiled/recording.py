"""One recording of a step's launches on a GPU (a CUDA graph), and its replay."""

import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from llama_fn.compiled.trace import rebuilt, tensors_of
from llama_fn.model.cache import Cache
from llama_fn.modes import gradients_enabled
from llama_fn.ops.extent import Extent, Lengths
from llama_fn.private import copy_each

R = TypeVar("R")
Pools = dict[torch.device, tuple[Any, Any]]


class Recording(NamedTuple):
    """What was launched, on which tensors at which addresses, and where it reads integers and writes results."""

    replay: Callable[[], None]
    fixed: list[weakref.ref]
    addresses: list[int]
    integers: list[Tensor]
    results: list[Tensor | int]  # a number stands for the fixed tensor that was written to
    structure: Any
    length: int  # the place of the cache's new length among the results
    growth: int  # how many tokens more it counts


def record(f: Callable, args: tuple, fixed: list[Tensor], pools: Pools, lengths: Lengths) -> Recording | None:
    """A recording of `f`, which runs at the first replay and not now; None where its new length is not known."""
    before = cast(Extent, lengths.get(cast(Cache, cache_of(args)).length))  # the caller has put it there
    replay, result = captured(lambda: f(*args), fixed[0].device, pools)
    results = tensors_of(result)
    new = cache_of(result if isinstance(result, tuple) and not isinstance(result, Cache) else (result,))
    if new is None or (after := lengths.get(new.length)) is None:
        return None
    places = {id(x): i for i, x in enumerate(fixed)}
    return Recording(replay, [weakref.ref(x) for x in fixed], [x.data_ptr() for x in fixed], integers_of(args),
                     [places.get(id(x), x) for x in own(results, fixed)],
                     rebuilt(result, itertools.repeat(torch.empty(0, device="cpu"))),
                     next(i for i, x in enumerate(results) if x is new.length), after.maximum - before.maximum)


def replayed(recording: Recording, args: tuple, length: Extent, lengths: Lengths) -> Any:
    """The result of `f` for these arguments, whose cache's length is known, as that of the result is then."""
    copy_each(recording.integers, integers_of(args))
    recording.replay()
    results = [cast(Tensor, recording.fixed[x]()) if isinstance(x, int) else x.clone() for x in recording.results]
    minimum, maximum = length.minimum + recording.growth, length.maximum + recording.growth
    lengths.put(results[recording.length], Extent(minimum, maximum, maximum))
    return rebuilt(recording.structure, iter(results))


def alive(recording: Recording) -> bool:
    """Whether its tensors still exist, with the same memory, and require no gradient."""
    gradients, tensors = gradients_enabled(), [x() for x in recording.fixed]
    return all(x is not None and not (gradients and x.requires_grad) and x.data_ptr() == address
               for x, address in zip(tensors, recording.addresses, strict=True))


def captured(f: Callable[[], R], device: torch.device, pools: Pools) -> tuple[Callable[[], None], R]:
    """A function that repeats all that `f` launches, and the result of `f`, whose memory each repetition overwrites.

    What lies between in `f` is in a pool that all recordings of one thread share: one replay is over before the next
    one begins.
    """
    if device not in pools:
        pools[device] = _new_pool(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pools[device][0]):
            result = f()
    except BaseException:
        del pools[device]  # torch takes it for one that is still being recorded to
        raise
    return graph.replay, result


def _new_pool(device: torch.device) -> tuple[Any, Any]:
    """A pool of memory, and an empty graph that uses it.

    Torch frees a pool as soon as no graph uses it, and cannot use it again then. The empty graph keeps it.
    """
    empty, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with warnings.catch_warnings(action="ignore"), torch.cuda.device(device), torch.cuda.graph(empty, pool=pool):
        pass
    return pool, empty


def cache_of(values: tuple) -> Cache | None:
    """The first cache among the values."""
    return next((x for x in values if isinstance(x, Cache)), None)


def integers_of(args: tuple) -> list[Tensor]:
    """What may differ between replays: the cache's length, and arguments that are tensors of integers."""
    return [x.length if isinstance(x, Cache) else x for x in args if isinstance(x, Cache) or is_integer(x)]


def fixed_of(args: tuple) -> list[Tensor]:
    """All other tensors: a recording is for these alone."""
    return tensors_of(*(x[:2] if isinstance(x, Cache) else x for x in args if not is_integer(x)))


def is_integer(x: Any) -> bool:
    """Whether this is a tensor of integers."""
    return isinstance(x, Tensor) and not x.is_floating_point()


def own(results: list[Tensor], fixed: list[Tensor]) -> list[Tensor]:
    """The results; one that lies in the memory of an argument is replaced by that argument."""
    places = {(x.data_ptr(), x.shape): x for x in fixed}
    return [places.get((x.data_ptr(), x.shape), x) for x in results]
