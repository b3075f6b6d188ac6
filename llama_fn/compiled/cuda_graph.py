"""`recorded`: all that a step launches on a GPU, as one launch (a CUDA graph)."""

import functools
import inspect
import itertools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from llama_fn.compiled.trace import filled, part, plain
from llama_fn.model.cache import Cache
from llama_fn.modes import far, recording, traced, transforms
from llama_fn.ops import room
from llama_fn.ops.extent import Extent, extent, noted, remembered
from llama_fn.private import autocast, copy_each
from llama_fn.shapes import bind

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
    """`f` of tensors and trees, one of them a cache, to a tuple with the cache of that many tokens more. Where all lies
    on one GPU, the second call with the same tensors records what it launches, and those after it replay that: a step
    has hundreds of kernels, and to launch one takes as long as to run it.

    The cache's length, and tensors of integers that are arguments themselves (tokens, keys), may be others at each
    call: they are copied, and so are results, but for those in the memory of a donated argument. How many slots are
    read follows the length, in steps of a quarter. The host waits for the GPU only where it reads a length that no step
    before has told it.

    Runs as it is: what is differentiated, mapped, traced or in `torch.inference_mode` (`no_grad` is recorded), and what
    makes a new length otherwise than `forward`. Recordings share memory: they are for one thread.
    """
    signature = inspect.signature(f)
    seen: OrderedDict[Hashable, list[weakref.ref]] = OrderedDict()
    known: OrderedDict[Hashable, Recording | None] = OrderedDict()  # None for what cannot be recorded

    @functools.wraps(f)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs:
            bound = bind(f, signature, args, kwargs)
            args, kwargs = bound.args, bound.kwargs
        cache = _cache(args)
        if cache is None or kwargs or not _ours(cache.length) or (length := extent(cache.length)) is None:
            return f(*args, **kwargs)
        reached = coarse(length.most, cache.k[0].shape[-2])
        if (key := _key(args, reached)) is None or (key in known and known[key] is None):
            return f(*args)
        ready = known.get(key)
        if ready is None or not _there(ready):  # another tensor may have the identity of one that is gone
            known.pop(key, None)
            fixed = _fixed(args)
            if len({x.device for x in fixed}) > 1 or not plain(fixed):
                return f(*args)
            before = [x() for x in seen.get(key, ())]
            if len(before) != len(fixed) or any(a is not b for a, b in zip(before, fixed, strict=True)):
                # The first time, what is not compiled yet is.
                _keep(seen, key, [weakref.ref(x) for x in fixed])
                return _first(f, _copies(args, length, reached), fixed)
            for other in [other for other, old in known.items() if old is not None and not _there(old)]:
                del known[other]
            # An error while a graph is recorded leaves the GPU's memory in disorder, so the room is checked before.
            room.check_room(cache.k[0], cache.length, 0)
            ready = _record(f, _copies(args, length, reached), fixed)
            _keep(known, key, ready)
            if ready is None:
                return f(*args)
        known.move_to_end(key)
        room.check_room(cache.k[0], cache.length, ready.growth)
        return _replayed(ready, args, length)

    return called


def _ours(length: Tensor) -> bool:
    return not traced() and far(length) and not transforms() and not recording(length) and not length.is_inference()


def _key(args: tuple, reached: int) -> Hashable | None:
    """What a recording is for; None for arguments without a hash. A tensor's hash is its identity: for the 600 of a
    model that takes 50 us, where to look at each takes 2 ms.
    """
    def one(x: Any) -> Hashable:
        if _integer(x):
            return x.shape, x.stride(), x.dtype
        if isinstance(x, Cache):
            return hash(x[:2]), x.length.shape
        return hash(x) if isinstance(x, Tensor | tuple) else x

    try:
        key = reached, torch.is_grad_enabled(), autocast(), *map(one, args)
        hash(key)
    except TypeError:
        return None
    return key


def _first(f: Callable, args: tuple, fixed: list[Tensor]) -> Any:
    result = f(*args)
    part((result,), results := [], [])
    return filled(result, iter(_own(results, fixed)))


def _copies(args: tuple, length: Extent, reached: int) -> tuple:
    """The arguments, integers of their own, of which slots up to `reached` are read."""
    copies = tuple(x._replace(length=x.length.clone()) if isinstance(x, Cache) else x.clone() if _integer(x) else x
                   for x in args)
    noted(_cache(copies).length, length._replace(reach=reached))
    return copies


def _record(f: Callable, args: tuple, fixed: list[Tensor]) -> Recording | None:
    """A recording of `f`, which runs at the first replay and not now; None where its new length is not known."""
    integers, before = _integers(args), extent(_cache(args).length)
    replay, result = captured(lambda: f(*args), fixed[0].device)
    part((result,), results := [], [])
    new = _cache(result if isinstance(result, tuple) and not isinstance(result, Cache) else (result,))
    if new is None or (after := remembered(new.length)) is None:
        return None
    places = {id(x): i for i, x in enumerate(fixed)}
    return Recording(replay, [weakref.ref(x) for x in fixed], [x.data_ptr() for x in fixed], integers,
                     [places.get(id(x), x) for x in _own(results, fixed)],
                     filled(result, itertools.repeat(torch.empty(0, device="cpu"))),
                     next(i for i, x in enumerate(results) if x is new.length), after.most - before.most)


def _replayed(ready: Recording, args: tuple, length: Extent) -> Any:
    copy_each(ready.integers, _integers(args))
    ready.replay()
    results = [ready.fixed[x]() if isinstance(x, int) else x.clone() for x in ready.results]
    least, most = length.least + ready.growth, length.most + ready.growth
    noted(results[ready.length], Extent(least, most, most))
    return filled(ready.structure, iter(results))


def captured(f: Callable[[], R], device: torch.device) -> tuple[Callable[[], None], R]:
    """What does again all that `f` launches there, and the result, in memory of its own that this writes to."""
    graph, pool = torch.cuda.CUDAGraph(), _pool(device)[0]
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            result = f()
    except BaseException:
        _pool.cache_clear()  # torch holds it for being written to, from now on
        raise
    return graph.replay, result


@functools.cache
def _pool(device: torch.device) -> tuple[Any, Any]:
    """Memory for what lies between: one replay is over before the next begins. An empty graph comes with it: torch
    forgets the memory when no graph has it any more, and cannot be given it again.
    """
    empty, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with warnings.catch_warnings(action="ignore"), torch.cuda.device(device), torch.cuda.graph(empty, pool=pool):
        pass
    return pool, empty


def _cache(values: tuple) -> Cache | None:
    return next((x for x in values if isinstance(x, Cache)), None)


def _integers(args: tuple) -> list[Tensor]:
    return [x.length if isinstance(x, Cache) else x for x in args if isinstance(x, Cache) or _integer(x)]


def _fixed(args: tuple) -> list[Tensor]:
    part(tuple(x[:2] if isinstance(x, Cache) else x for x in args if not _integer(x)), tensors := [], [])
    return tensors


def _there(ready: Recording) -> bool:
    """Whether its tensors are still there, with the same memory, and no gradient is asked of them."""
    tensors, grad = [x() for x in ready.fixed], torch.is_grad_enabled()
    return (all(x is not None and not (grad and x.requires_grad) for x in tensors)
            and [x.data_ptr() for x in tensors] == ready.addresses)


def _own(results: list[Tensor], fixed: list[Tensor]) -> list[Tensor]:
    """The results, those in the memory of an argument as that argument itself."""
    own = {(x.data_ptr(), x.shape): x for x in fixed}
    return [own.get((x.data_ptr(), x.shape), x) for x in results]


def _integer(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point()


def _keep(places: OrderedDict, key: Hashable, value: Any) -> None:
    places[key] = value
    while len(places) > MOST:
        places.popitem(last=False)


def coarse(most: int, slots: int) -> int:
    """A length up to a quarter more than `most`, with which one token more fills pages, two of them or more, as far as
    there are as many."""
    step = max(2 * room.PAGE, 2 ** ((most + 1).bit_length() - 3))
    upper, whole = -(-(most + 1) // step) * step, slots // room.PAGE * room.PAGE
    return min(upper, whole if most < whole else max(most + 1, slots)) - 1
