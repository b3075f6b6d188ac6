"""Randomness as a value: JAX's keys and counters, so that one key gives the same bits as `jax.random`.

Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), 20 rounds, counted as JAX's
partitionable generator counts: element i of an array is the block function of the key at counter i, whatever the
array's shape, the device, or the batch. A key is two 32-bit words. Torch does no arithmetic on unsigned words, so
they lie in int64, each in [0, 2**32). To draw for many keys at once, `vmap` over them.
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
from llama_fn.threefry import MASK, counters, remainder, signed, threefry2x32

Key = Int[Tensor, "2"]
Shape = Sequence[int]

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@typed
def key(seed: int, device: torch.device | str = "cpu") -> Key:
    """The key of a seed in [0, 2**64): its high and low words. (Torch's default device has no say, here and elsewhere.)
    """
    seed = integer("random.key: seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"random.key: a seed lies in [0, 2**64), got {seed}")
    return torch.tensor([seed >> 32, seed & MASK], device=device)


@typed
def split(key: Key, num: int | tuple[int, ...] = 2) -> Int[Tensor, "*num 2"]:
    """`num` new keys, independent of each other and of this one (which should not be used again)."""
    shape = (num,) if is_integer(num) else num
    return torch.stack(threefry2x32(key, *counters(shape, key.device)), -1)


@typed
def fold_in(key: Key, data: int | Int[Tensor, ""]) -> Key:
    """The key's child number `data`, in [0, 2**32): a position, a step, a rank."""
    if is_integer(data) and not 0 <= data <= MASK:
        raise ValueError(f"random.fold_in: data lies in [0, 2**32), got {data}")
    low = torch.as_tensor(data, device=key.device).to(torch.int64) & MASK
    return torch.stack(threefry2x32(key, torch.zeros_like(low), low), -1)


@typed
def bits(key: Key, shape: Shape = (), width: int = 32) -> Int[Tensor, "*shape"]:
    """Uniform words of `width` bits (8, 16, 32 or 64) in int64; of 64 bits, the word's two's complement."""
    if (width := integer("random.bits: width", width)) not in (8, 16, 32, 64):
        raise ValueError(f"random.bits: width must be 8, 16, 32 or 64, got {width}")
    high, low = threefry2x32(key, *counters(shape, key.device))
    return (high << 32) | low if width == 64 else (high ^ low) & (2**width - 1)


@typed
def uniform(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32,
            minval: float = 0.0, maxval: float = 1.0) -> Float[Tensor, "*shape"]:
    """Uniform on [minval, maxval): as many random bits as the dtype's mantissa has.

    On [0, 1) nothing rounds up to 1; a narrow range far from 0 may round up to `maxval`, as in JAX.
    """
    mantissa = MANTISSA_BITS[dtype]
    width = 8 if mantissa < 8 else torch.finfo(dtype).bits  # as JAX does: bfloat16 draws 8 bits
    integer = (bits(key, shape, width) >> (width - mantissa)) & (2**mantissa - 1)
    limits = (number(f"random.uniform: {name}", x, -math.inf, above=True)
              for name, x in (("minval", minval), ("maxval", maxval)))
    low, high = (torch.full((), x, dtype=dtype, device=key.device) for x in limits)
    return torch.maximum(low, integer.to(dtype) * 2.0**-mantissa * (high - low) + low)


@typed
def randint(key: Key, shape: Shape, minval: int, maxval: int,
            dtype: torch.dtype = torch.int32) -> Integer[Tensor, "*shape"]:
    """Uniform integers of [minval, maxval): the remainder of random words by the size of the range.

    As in JAX, limits beyond the dtype are moved to its edge (a `maxval` of its largest number plus 1 includes that
    number), and an empty range gives `minval`. Up to 2**16 numbers come of two words each, and their probabilities are
    equal to 2**-48; more of them come of one word (of int64, the words have 64 bits, and up to 2**32 come of two).
    Raises `ValueError` for a dtype that is not of integers.
    """
    if dtype not in INTEGERS:
        raise ValueError(f"random.randint: dtype must be one of {', '.join(map(str, INTEGERS))}, got {dtype}")
    minval, maxval = integer("random.randint: minval", minval), integer("random.randint: maxval", maxval)
    info, width = torch.iinfo(dtype), max(32, torch.iinfo(dtype).bits)
    low, high = max(info.min, min(minval, info.max)), max(info.min, min(maxval, info.max + 1))
    span = max(high - low, 1)
    higher, lower = (remainder(bits(each, shape, width), span, width) for each in split(key))
    wrapped = (2 ** (width // 2) % span) ** 2 % 2**width % span  # 2**width % span, but for ranges above 2**(width / 2)
    total = higher * signed(wrapped) + lower  # modulo 2**64
    return (remainder(total if width == 64 else total & MASK, span, width) + signed(low)).to(dtype)


@typed
def permutation(key: Key, x: int | Shaped[Tensor, "..."], axis: int = 0,
                independent: bool = False) -> Shaped[Tensor, "..."]:
    """The numbers 0 to x - 1 in random order, or a tensor with its slices along `axis` in random order; if they are
    `independent`, each vector along that axis is in an order of its own.

    The elements are sorted by random words, three times if they are many, so that equal words hardly matter. Raises
    `ValueError` for a negative number and for an axis that the tensor does not have.
    """
    if is_integer(x):
        x = torch.arange(integer("random.permutation: the number of elements", x, 0), device=key.device)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"random.permutation: axis {axis} is not one of a tensor of {x.ndim} axes")
    if independent or x.ndim == 1:
        return _shuffled(key, x, axis)
    return x.index_select(axis, _shuffled(key, torch.arange(x.shape[axis], device=key.device), 0).to(x.device))


@typed
def bernoulli(key: Key, p: float | Float[Tensor, "..."] = 0.5, shape: Shape | None = None) -> Bool[Tensor, "*shape"]:
    """True with probability `p`: where a uniform number of its dtype (float32 for a plain number) is below it.

    `shape` is that of `p`, or one that `p` can be broadcast to. Raises `ValueError` for another.
    """
    p = torch.as_tensor(p, dtype=None if isinstance(p, Tensor) else torch.float32, device=key.device)
    shape = p.shape if shape is None else tuple(shape)
    try:
        fits = torch.broadcast_shapes(p.shape, shape) == torch.Size(shape)
    except (RuntimeError, ValueError):  # the second for an axis below 0
        fits = False
    if not fits:
        raise ValueError(f"random.bernoulli: p of shape {tuple(p.shape)} cannot be broadcast to {tuple(shape)}")
    return uniform(key, shape, p.dtype) < p


@typed
def normal(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard normal, by the inverse of its distribution function: sqrt(2) erfinv(u), u uniform on (-1, 1)."""
    smallest = -1 + torch.finfo(dtype).eps / 2  # the next number after -1
    return torch.erfinv(uniform(key, shape, dtype, smallest, 1.0)) * math.sqrt(2)


@typed
def rademacher(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Random signs: 1 and -1, equally likely."""
    return 1 - 2 * (bits(key, shape) >> 31).to(dtype)


@typed
def gumbel(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard Gumbel: -log(-log u), u uniform on (0, 1)."""
    return -torch.log(-torch.log(uniform(key, shape, dtype, torch.finfo(dtype).tiny, 1.0)))


@typed
def categorical(key: Key, logits: Float[Tensor, "*logits"], axis: int = -1,
                shape: Shape | None = None) -> Int[Tensor, "*indices"]:
    """Indices along `axis` with probabilities softmax(logits), by the Gumbel-max trick.

    `shape`, if given, ends in the shape of `logits` without `axis`; the axes before it are independent draws.
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
    """A tree of draws, each leaf with a key of its own, and of the shape, dtype and device of that leaf of `value`.

    (Optax's `tree.random_like`.)
    """
    keys = iter(split(key, len(tree.leaves(value))))
    return tree.map(lambda x: draw(next(keys).to(x.device), x.shape, x.dtype), value)


def _shuffled(key: Tensor, x: Tensor, axis: int) -> Tensor:
    """`x` sorted along an axis by random words, so often that hardly any two have equal words every time."""
    for _ in range(math.ceil(3 * math.log(max(1, x.numel())) / math.log(MASK))):
        key, other = split(key)
        x = x.gather(axis, bits(other, x.shape).sort(dim=axis, stable=True).indices)
    return x
