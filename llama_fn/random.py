"""Random numbers as pure functions of a key; the same key gives the same bits as ``jax.random``.

A key is two 32-bit words, in int64. Threefry-2x32 (``threefry.py``) counts as JAX's partitionable generator does:
element i of a result is its block function at counter i, on every device. For many keys, use ``torch.vmap``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor

from llama_fn import tree
from llama_fn.ranges import integer, is_integer, number
from llama_fn.shapes import typed
from llama_fn.threefry import MASK, counters, long_remainder, signed, threefry2x32

__all__ = ["bernoulli", "bits", "categorical", "fold_in", "gumbel", "key", "like", "normal", "permutation",
           "rademacher", "randint", "split", "threefry2x32", "uniform"]

Key = Int[Tensor, "2"]
Shape = Sequence[int]

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@typed
def key(seed: int, device: torch.device | str = "cpu") -> Key:
    """The key of a seed in [0, 2**64): its high and its low 32 bits; `ValueError` for another seed.

    >>> key = lf.random.key(0)
    """
    seed = integer("random.key: seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"random.key: a seed lies in [0, 2**64), got {seed}")
    return torch.tensor([seed >> 32, seed & MASK], device=device)


@typed
def split(key: Key, num: int | tuple[int, ...] = 2) -> Int[Tensor, "*num 2"]:
    """New keys, ``num`` of them or an array of that shape; do not use the given key again.

    >>> key, noise = lf.random.split(key)
    """
    shape = num if isinstance(num, tuple) else (num,)
    return torch.stack(threefry2x32(key, *counters(shape, key.device)), -1)


@typed
def fold_in(key: Key, data: int | Int[Tensor, ""]) -> Key:
    """The child of a key with a number in [0, 2**32), as a position or a step; `ValueError` for another number.

    >>> first, second = lf.random.fold_in(key, 1), lf.random.fold_in(key, 2)
    """
    if is_integer(data) and not 0 <= data <= MASK:
        raise ValueError(f"random.fold_in: data lies in [0, 2**32), got {data}")
    low = torch.as_tensor(data, device=key.device).to(torch.int64) & MASK
    return torch.stack(threefry2x32(key, torch.zeros_like(low), low), -1)


@typed
def bits(key: Key, shape: Shape = (), width: int = 32) -> Int[Tensor, "*shape"]:
    """Uniform random words of ``width`` bits: unsigned words of 8, 16 or 32 bits, or the two's complement of 64 bits.

    >>> words = lf.random.bits(key, (3, 4))
    """
    if (width := integer("random.bits: width", width)) not in (8, 16, 32, 64):
        raise ValueError(f"random.bits: width must be 8, 16, 32 or 64, got {width}")
    high, low = threefry2x32(key, *counters(shape, key.device))
    return (high << 32) | low if width == 64 else (high ^ low) & (2**width - 1)


@typed
def uniform(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32,
            minval: float = 0.0, maxval: float = 1.0) -> Float[Tensor, "*shape"]:
    """Uniform numbers in [minval, maxval), with as many random bits as the dtype's mantissa has.

    In [0, 1) no number is rounded up to 1. In a narrow range far from 0 a number may be rounded up to ``maxval``, as in
    JAX. Raises `ValueError` for a limit that is not finite.

    >>> x = lf.random.uniform(key, (3, 4), minval=-1.0)
    """
    mantissa = MANTISSA_BITS[dtype]
    width = 8 if mantissa < 8 else torch.finfo(dtype).bits  # like JAX, which draws 8 bits for bfloat16
    integer = (bits(key, shape, width) >> (width - mantissa)) & (2**mantissa - 1)
    limits = (number(f"random.uniform: {name}", x, -math.inf, above=True)
              for name, x in (("minval", minval), ("maxval", maxval)))
    low, high = (torch.full((), x, dtype=dtype, device=key.device) for x in limits)
    return torch.maximum(low, integer.to(dtype) * 2.0**-mantissa * (high - low) + low)


@typed
def randint(key: Key, shape: Shape, minval: int, maxval: int,
            dtype: torch.dtype = torch.int32) -> Integer[Tensor, "*shape"]:
    """Uniform integers in [minval, maxval): the remainders of random words divided by the size of the range.

    As in JAX, a limit that the dtype cannot hold becomes its nearest number, but ``maxval`` may be one above the
    largest. An empty range gives ``minval``. A range of up to 2**16 integers (2**32 for int64) takes two random words
    for each, so that their probabilities are equal to 2**-48. Raises `ValueError` for a dtype that is not of integers.

    >>> dice = lf.random.randint(key, (10,), 1, 7)
    """
    if dtype not in INTEGERS:
        raise ValueError(f"random.randint: dtype must be one of {', '.join(map(str, INTEGERS))}, got {dtype}")
    minval, maxval = integer("random.randint: minval", minval), integer("random.randint: maxval", maxval)
    info, width = torch.iinfo(dtype), max(32, torch.iinfo(dtype).bits)
    low, high = max(info.min, min(minval, info.max)), max(info.min, min(maxval, info.max + 1))
    span = max(high - low, 1)
    upper_words, lower_words = (bits(each, shape, width) for each in split(key))
    return (long_remainder(upper_words, lower_words, span, width) + signed(low)).to(dtype)


@typed
def permutation(key: Key, x: int | Shaped[Tensor, "..."], axis: int = 0,
                independent: bool = False) -> Shaped[Tensor, "..."]:
    """The integers 0 to x - 1 in random order; or a tensor with its slices along an axis in random order.

    If ``independent``, every vector along ``axis`` has an order of its own; else all have the same. Raises `ValueError`
    for a negative number and for an axis that the tensor does not have.

    >>> order = lf.random.permutation(key, 10)
    """
    if not isinstance(x, Tensor):
        x = torch.arange(integer("random.permutation: the number of elements", x, 0), device=key.device)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"random.permutation: axis {axis} is not one of a tensor of {x.ndim} axes")
    if independent or x.ndim == 1:
        return _shuffled(key, x, axis)
    return x.index_select(axis, _shuffled(key, torch.arange(x.shape[axis], device=key.device), 0).to(x.device))


@typed
def bernoulli(key: Key, p: float | Float[Tensor, "..."] = 0.5, shape: Shape | None = None) -> Bool[Tensor, "*shape"]:
    """True with probability ``p``, else False.

    ``shape`` is that of ``p``, or one that ``p`` can be broadcast to; `ValueError` for another. It is true where a
    uniform number, in the dtype of ``p`` (float32 for a plain number), is below ``p``.

    >>> mask = lf.random.bernoulli(key, 0.1, (3, 4))
    """
    p = torch.as_tensor(p, dtype=None if isinstance(p, Tensor) else torch.float32, device=key.device)
    shape = p.shape if shape is None else tuple(shape)
    try:
        fits = torch.broadcast_shapes(p.shape, shape) == torch.Size(shape)
    except (RuntimeError, ValueError):  # ValueError: a negative size
        fits = False
    if not fits:
        raise ValueError(f"random.bernoulli: p of shape {tuple(p.shape)} cannot be broadcast to {tuple(shape)}")
    return uniform(key, shape, p.dtype) < p


@typed
def normal(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard normal numbers: sqrt(2) erfinv(u), with u uniform in (-1, 1).

    >>> x = lf.random.normal(key, (3, 4))
    """
    smallest = -1 + torch.finfo(dtype).eps / 2  # the number after -1, so that -1 itself is left out
    return torch.erfinv(uniform(key, shape, dtype, smallest, 1.0)) * math.sqrt(2)


@typed
def rademacher(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Random signs: 1 and -1, equally likely.

    >>> signs = lf.random.rademacher(key, (3, 4))
    """
    return 1 - 2 * (bits(key, shape) >> 31).to(dtype)


@typed
def gumbel(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard Gumbel numbers: -log(-log u), with u uniform in (0, 1).

    >>> noise = lf.random.gumbel(key, (3, 4))
    """
    return -torch.log(-torch.log(uniform(key, shape, dtype, torch.finfo(dtype).tiny, 1.0)))


@typed
def categorical(key: Key, logits: Float[Tensor, "*logits"], axis: int = -1,
                shape: Shape | None = None) -> Int[Tensor, "*indices"]:
    """Indices along an axis of the logits, with the probabilities softmax(logits), by the Gumbel-max trick.

    ``shape``, if given, ends with the shape of ``logits`` without ``axis``; the axes before that are independent draws.
    Raises `ValueError` for another shape.

    >>> token = lf.random.categorical(key, logits)
    """
    axis = axis % logits.ndim
    batch = (*logits.shape[:axis], *logits.shape[axis + 1:])
    shape = batch if shape is None else tuple(shape)
    draws = shape[:len(shape) - len(batch)]
    if shape[len(draws):] != batch:
        raise ValueError(f"random.categorical: shape {shape} must end in the logits' batch axes {batch}")
    noise = gumbel(key.to(logits.device), (*draws, *logits.shape), logits.dtype)
    return torch.argmax(noise + logits, dim=len(draws) + axis)


@typed
def like(key: Key, value: Any, draw: Callable[[Key, Shape, torch.dtype], Tensor] = normal) -> Any:
    """A tree of ``draw(key, shape, dtype)`` for each leaf of a tree, with a key each (Optax's ``tree.random_like``).

    >>> direction = lf.random.like(key, params)
    """
    keys = iter(split(key, len(tree.leaves(value))))
    return tree.map(lambda x: draw(next(keys).to(x.device), x.shape, x.dtype), value)


def _shuffled(key: Tensor, x: Tensor, axis: int) -> Tensor:
    """`x` sorted along an axis by random words: three times if it is large, so that equal words hardly matter."""
    for _ in range(math.ceil(3 * math.log(max(1, x.numel())) / math.log(MASK))):
        key, other = split(key)
        x = x.gather(axis, bits(other, x.shape).sort(dim=axis, stable=True).indices)
    return x
