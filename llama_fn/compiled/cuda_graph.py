"""`recorded`: all that a step launches on a GPU, as one launch (a CUDA graph)."""

import functools
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar, cast

from torch import Tensor

from llama_fn import tree
from llama_fn.compiled.recording import Pools, Recording, alive, cache_of, fixed_of, is_integer, own, record, replayed
from llama_fn.compiled.trace import rebuilt, tensors_of
from llama_fn.model.cache import Cache
from llama_fn.modes import autocast, gradients_enabled, on_gpu, plain, recording, traced, transforms
from llama_fn.ops import room
from llama_fn.ops.extent import Extent, Lengths, extent, with_lengths
from llama_fn.ops.weight import is_divided
from llama_fn.shapes import bind

P = ParamSpec("P")
R = TypeVar("R")

MAX_RECORDINGS = 64  # each new cache needs a recording of its own, and another one for each quarter more slots in use


class OfThread(threading.local):
    """What one thread has recorded. Another thread never replays it: the memory for results would be the same."""

    def __init__(self) -> None:
        self.seen: OrderedDict[Hashable, list[weakref.ref]] = OrderedDict()  # what ran once, with which tensors
        self.known: OrderedDict[Hashable, Recording | None] = OrderedDict()  # None for what cannot be recorded
        self.pools: Pools = {}
        self.lengths = Lengths()  # so that the host does not wait for the length of a result


def recorded(f: Callable[P, R]) -> Callable[P, R]:
    """`f`, whose launches on a GPU are recorded at the second call with the same tensors, and replayed from then on.

    A step has hundreds of kernels, and to launch one takes as long as to run it. `f` takes tensors and trees, one of
    them a cache, and gives a tuple with the cache of that many tokens more. All must lie on one GPU.

    A recording reads and writes the memory of the tensors that it was made with, so it serves those alone. The cache's
    length, and tensors of integers that are arguments themselves (tokens, keys), may differ at each call: they are
    copied in. Results are copied out, except those in the memory of a donated argument. The number of slots that are
    read follows the length, in steps of a quarter. The host waits for the GPU only to read a length that it does not
    know from an earlier step.

    `f` runs as it is for what is differentiated, mapped or traced, in `torch.inference_mode` (`no_grad` is recorded),
    and if it makes a new length otherwise than `forward` does. Each thread records for itself.
    """
    signature = inspect.signature(f)
    plain_f = cast("Callable[..., Any]", f)
    ours = OfThread()

    @functools.wraps(f)
    def called(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            bound = bind(f, signature, args, kwargs)
            args, kwargs = bound.args, bound.kwargs
        cache = cache_of(args)
        if cache is None or kwargs or not _may_be_recorded(cache.length):
            return plain_f(*args, **kwargs)
        with with_lengths(ours.lengths):
            return of_known_length(args, cache, extent(cache.length))

    def of_known_length(args: tuple, cache: Cache, length: Extent | None) -> Any:
        if length is None:
            return plain_f(*args)
        limit = rounded_up(length.maximum, cache.k[0].shape[-2])
        if (key := _key(args, limit)) is None or (key in ours.known and ours.known[key] is None):
            return plain_f(*args)
        ready = ours.known.get(key)
        if ready is None or not alive(ready):  # a new tensor may have the identity of one that is gone
            ours.known.pop(key, None)
            if any(map(is_divided, tree.leaves(args, is_divided))):  # untried with what NCCL launches
                _keep(ours.known, key, None)
                return plain_f(*args)
            fixed = fixed_of(args)
            if len({x.device for x in fixed}) > 1 or not plain(fixed):
                return plain_f(*args)
            before = [x() for x in ours.seen.get(key, ())]
            if len(before) != len(fixed) or any(a is not b for a, b in zip(before, fixed, strict=True)):
                _keep(ours.seen, key, [weakref.ref(x) for x in fixed])  # the first run compiles what is not yet
                return _first(plain_f, _copies(args, cache, length._replace(read_up_to=limit), ours.lengths), fixed)
            for other in [other for other, old in ours.known.items() if old is not None and not alive(old)]:
                del ours.known[other]
            # An error during a recording would leave the memory of the GPU in disorder.
            room.check_room(cache.k[0], cache.length, length, 0)
            copies = _copies(args, cache, length._replace(read_up_to=limit), ours.lengths)
            ready = record(plain_f, copies, fixed, ours.pools, ours.lengths)
            _keep(ours.known, key, ready)
            if ready is None:
                return plain_f(*args)
        ours.known.move_to_end(key)
        room.check_room(cache.k[0], cache.length, length, ready.growth)
        return replayed(ready, args, length, ours.lengths)

    return cast("Callable[P, R]", called)


def _may_be_recorded(length: Tensor) -> bool:
    return (not traced() and on_gpu(length) and not transforms() and not recording(length)
            and not length.is_inference())


def _key(args: tuple, limit: int) -> Hashable | None:
    """What a recording is for; None for arguments without a hash.

    A tensor's hash is its identity. For the 600 tensors of a model that takes 50 us, while a look at each takes 2 ms.
    `alive` then tells whether they still are the tensors of the recording.
    """
    def one(x: Any) -> Hashable:
        if is_integer(x):
            return x.shape, x.stride(), x.dtype
        if isinstance(x, Cache):
            return hash(x[:2]), x.length.shape
        return hash(x) if isinstance(x, Tensor | tuple) else x

    try:
        key = limit, gradients_enabled(), autocast(), *map(one, args)
        hash(key)
    except TypeError:
        return None
    return key


def _first(f: Callable, args: tuple, fixed: list[Tensor]) -> Any:
    result = f(*args)
    return rebuilt(result, iter(own(tensors_of(result), fixed)))


def _copies(args: tuple, cache: Cache, known: Extent, lengths: Lengths) -> tuple:
    """The arguments with integers of their own, and a cache of whose length this is known."""
    longer = cache.length.clone()
    lengths.put(longer, known)
    return tuple(x._replace(length=longer) if x is cache else x._replace(length=x.length.clone())
                 if isinstance(x, Cache) else x.clone() if is_integer(x) else x for x in args)


def _keep(places: OrderedDict, key: Hashable, value: Any) -> None:
    places[key] = value
    while len(places) > MAX_RECORDINGS:
        places.popitem(last=False)


def rounded_up(length: int, slots: int) -> int:
    """A length at most a quarter above `length`, so that one recording serves many lengths.

    With one token more it fills whole pages, two of them or more, as far as the cache has as many.
    """
    step = max(2 * room.PAGE, 2 ** ((length + 1).bit_length() - 3))
    upper, whole = -(-(length + 1) // step) * step, slots // room.PAGE * room.PAGE
    return min(upper, whole if length < whole else max(length + 1, slots)) - 1
