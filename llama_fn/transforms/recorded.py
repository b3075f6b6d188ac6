"""`recorded`: all that a step launches on a GPU, as one launch (a CUDA graph)."""

import functools
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from llama_fn.model import cache as kv
from llama_fn.model.cache import Cache, Extent, extent, noted
from llama_fn.shapes import recording, traced, transforms
from llama_fn.transforms.compiled import filled, part, plain

P = ParamSpec("P")
R = TypeVar("R")

MOST = 64  # recordings that are kept: every new cache is another, and every quarter more of its slots in use


class Recording(NamedTuple):
    """What was launched, on which tensors at which addresses, and where it reads integers and writes results."""

    replay: Callable[[], None]
    fixed: list[weakref.ref]
    addresses: list[int]
    integers: list[Tensor]
    results: list[Tensor | int]  # a number stands for the fixed tensor that was written to
    structure: Any
    length: int  # which of the results is the cache's
    growth: int  # of that length


def recorded(f: Callable[P, R]) -> Callable[P, R]:
    """`f` of tensors and trees, one of them a cache. Where all lies on one GPU, the second call with the same tensors
    records what it launches, and those after it replay that: a step has hundreds of kernels, and to launch one takes as
    long as to run it.

    The cache's length, and tensors of integers that are arguments themselves (tokens, keys), may be others at each
    call: they are copied, and so are results, but for those in the memory of a donated argument. How many slots are
    read follows the length, in steps of a quarter. The host waits for the GPU only where it reads a length that no step
    before has told it.
    """
    known: OrderedDict[Hashable, Recording | None] = OrderedDict()

    @functools.wraps(f)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        cache = next((x for x in args if isinstance(x, Cache)), None)
        if cache is None or kwargs or traced() or transforms() or recording(cache.length) or not on_gpu(cache.length):
            return f(*args, **kwargs)
        length, slots = extent(cache.length), cache.k[0].shape[-2]
        reached = coarse(length.most, slots)
        integers = _integers(args)
        # A tensor's hash is its identity: of the 600 of a model that takes 50 us, where to look at each takes 2 ms.
        fixed = hash(tuple(x[:2] if isinstance(x, Cache) else None if _integer(x) else x for x in args))
        key = fixed, reached, torch.is_grad_enabled(), *((x.shape, x.stride()) for x in integers)

        ready = known.get(key)
        if ready is not None and not _there(ready):  # another tensor may have the identity of one that is gone
            ready = known.pop(key) and None
        if ready is None:
            tensors = _fixed(args)
            if len({x.device for x in tensors + integers}) > 1 or not plain(tensors + integers):
                return f(*args)
            if key in known:
                ready = known[key] = _record(f, _copies(args, length, reached), tensors)
            else:
                known[key] = None
                while len(known) > MOST:
                    known.popitem(last=False)
        if ready is None or length.least < 0 or length.most + ready.growth > slots:
            result = f(*_copies(args, length, reached))  # what is not compiled is; and what is wrong is said
            part((result,), results := [], [])
            return filled(result, iter(_own(results, _fixed(args))))
        known.move_to_end(key)
        torch._foreach_copy_(ready.integers, integers)
        ready.replay()
        results = [ready.fixed[x]() if isinstance(x, int) else x.clone() for x in ready.results]
        noted(results[ready.length], Extent(length.least + ready.growth, *[length.most + ready.growth] * 2))
        return filled(ready.structure, iter(results))

    return called


def _copies(args: tuple, length: Extent, reached: int) -> tuple:
    """The arguments, integers of their own, of which slots up to `reached` are read."""
    copies = tuple(x._replace(length=x.length.clone()) if isinstance(x, Cache) else x.clone() if _integer(x) else x
                   for x in args)
    noted(next(x for x in copies if isinstance(x, Cache)).length, length._replace(reach=reached))
    return copies


def _record(f: Callable, args: tuple, fixed: list[Tensor]) -> Recording:
    integers = _integers(args)
    before = extent(next(x for x in args if isinstance(x, Cache)).length)
    replay, result = captured(lambda: f(*args), fixed[0].device)
    part((result,), results := [], [])
    new = next(x for x in (result if type(result) is tuple else (result,)) if isinstance(x, Cache)).length
    places = {id(x): i for i, x in enumerate(fixed)}
    return Recording(replay, [weakref.ref(x) for x in fixed], [x.data_ptr() for x in fixed], integers,
                     [places.get(id(x), x) for x in _own(results, fixed)],
                     filled(result, itertools.repeat(torch.empty(0))),
                     next(i for i, x in enumerate(results) if x is new), extent(new).most - before.most)


def captured(f: Callable[[], R], device: torch.device) -> tuple[Callable[[], None], R]:
    """What does again all that `f` launches there, and the result, in memory of its own that this writes to."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=_pool(device)):
            result = f()
    except BaseException:
        _pool.cache_clear()  # torch holds it for being written to, from now on
        raise
    return graph.replay, result


@functools.cache
def _pool(device: torch.device) -> Any:
    """Memory for what lies between: one replay is over before the next begins."""
    return torch.cuda.graph_pool_handle()


def on_gpu(x: Tensor) -> bool:
    """Whether the tensor lies where launches can be recorded."""
    return x.is_cuda


def _integers(args: tuple) -> list[Tensor]:
    return [x.length if isinstance(x, Cache) else x for x in args if isinstance(x, Cache) or _integer(x)]


def _fixed(args: tuple) -> list[Tensor]:
    part(tuple(x[:2] if isinstance(x, Cache) else x for x in args if not _integer(x)), tensors := [], [])
    return tensors


def _there(ready: Recording) -> bool:
    tensors = [x() for x in ready.fixed]
    return all(x is not None for x in tensors) and [x.data_ptr() for x in tensors] == ready.addresses


def _own(results: list[Tensor], fixed: list[Tensor]) -> list[Tensor]:
    """The results, those in the memory of an argument as that argument itself."""
    own = {(x.data_ptr(), x.shape): x for x in fixed}
    return [own.get((x.data_ptr(), x.shape), x) for x in results]


def _integer(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point()


def coarse(most: int, slots: int) -> int:
    """A length up to a quarter more than `most`, with which one token more fills pages, two of them or more, as far as
    there are as many."""
    step = max(2 * kv.PAGE, 2 ** ((most + 1).bit_length() - 3))
    upper, whole = -(-(most + 1) // step) * step, slots // kv.PAGE * kv.PAGE
    return min(upper, whole if most < whole else max(most + 1, slots)) - 1
