"""A model's weights wherever they lie: names, shapes and dtypes first, numbers only when asked for.

A format is two functions: one opens such a folder as `Weights`, one writes `Weights` to such a folder. To load is to
open and to read every leaf; to convert is to open one and write the other, a leaf at a time and never a whole tree.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint import quantized
from llama_fn.config import Config
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params

HEADS = ("k", "g", "h")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Report = Callable[[int], None]


def check_dtype(dtype: Any) -> None:
    """Raise `ValueError` for what weights cannot be cast to."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None (as stored) or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")


class Stored(NamedTuple):
    """One entry of a file, as its header tells: `kind` is a tensor's dtype, or in words what else it is."""

    file: str
    name: str
    kind: torch.dtype | str
    shape: tuple[int, ...]


class Weights(NamedTuple):
    """What is known of weights before a number is read, and `read`, which gives the leaf at a path of the tree.

    `problems` are reasons not to load them, `notes` are worth a warning. `tied` weights have one matrix as embedding
    and output. `dtype` is what `read` gives of tensors, `bits` ("int8", "int4") what matrices are quantized to.
    """

    config: Config
    read: Callable[[str], Any]
    dtype: torch.dtype
    stored: list[Stored]
    problems: list[str] = []  # noqa: RUF012, nobody adds to it
    notes: list[str] = []  # noqa: RUF012
    tied: bool = False
    bits: str = ""

    def plain(self, where: str) -> "Weights":
        """These weights. Raises `ValueError` if they are quantized: `where` has no place for that."""
        if self.bits:
            raise ValueError(f"{where} cannot hold quantized weights ({self.bits}): write them in the format meta, in "
                             "one file, or as the tensors that they stand for, lf.dequantize(params)")
        return self

    def checked(self, where: Any) -> "Weights":
        """These weights. Raises `ValueError` with every problem in it, and warns of the notes."""
        for note in self.notes:
            warnings.warn(note, stacklevel=3)
        if self.problems:
            raise ValueError(f"{where}: {len(self.problems)} weights do not fit the settings:\n  "
                             + "\n  ".join(self.problems))
        return self


def weights_of(params: Params, dtype: torch.dtype | None = None) -> Weights:
    """The weights of a tree, cast leaf by leaf to `dtype` (None leaves them, and so stay integers and their scales).

    Raises `ValueError` for wrong shapes, and for adapters that are not merged.
    """
    check_dtype(dtype)
    leaves, abstract = quantized.together(tree.paths(params)), tree.paths(abstract_params(params.config))
    for path in [path for path in leaves if path not in abstract]:
        if other := next((name for name in abstract if path.startswith(f"{name}.")), None):
            raise ValueError(f"{other} is no plain tensor, as files need them; an adapter must be merged first: say "
                             "lora.merge in the place of lora.apply, of lf.dequantize(params) if it lies on integers")
    shapes = [{path: list(x.shape) for path, x in weights.items()} for weights in (abstract, leaves)]
    wrong = [f"{path}: should be {shapes[0].get(path)}, is {shapes[1].get(path)}"
             for path in abstract | leaves if shapes[0].get(path) != shapes[1].get(path)]
    if wrong:
        raise ValueError("the parameters do not fit their config:\n  " + "\n  ".join(wrong))

    def read(path: str) -> Any:
        return leaves[path].detach().to(dtype) if isinstance(leaves[path], Tensor) else leaves[path]

    return Weights(params.config, read, dtype or params.embedding.dtype, [],
                   tied=isinstance(params.output, Tensor) and is_same(params.embedding, params.output),
                   bits=quantized.bits(x.values.dtype for x in leaves.values() if not isinstance(x, Tensor)))


def params_of(weights: Weights, device: torch.device | str | None = None,
              form: Callable[[str, Weight, Tensor], Any] = lambda path, weight, x: x) -> Params:
    """The tree of all leaves, each in the `form` it is to have as soon as it is read."""
    def leaf(path: str, weight: Weight) -> Any:
        return form(path, weight, tree.map(lambda x: x.to(device), weights.read(path)))

    params = tree.map_with_path(leaf, abstract_params(weights.config))
    return params._replace(output=params.embedding) if weights.tied and isinstance(params.output, Tensor) else params


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one and the same memory."""
    return a is b or (a.device.type != "meta" and a.data_ptr() == b.data_ptr() and a.shape == b.shape)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their dtypes; NaN is the same as NaN."""
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | a.isnan() & b.isnan()).all()))


def flat_shape(weight: Weight) -> tuple[int, ...]:
    """The shape without the heads' axes: "k g h d" becomes (kgh, d) and "d k g h" becomes (d, kgh)."""
    sizes, last = [], ""
    for axis, size in zip(weight.axes.split(), weight.shape, strict=True):
        if axis in HEADS and last in HEADS:
            sizes[-1] *= size
        else:
            sizes.append(size)
        last = axis
    return tuple(sizes)


def layer_of(path: str) -> str:
    """`blocks.3` for all leaves of layer 3; what is in no layer stands for itself."""
    return ".".join(path.split(".")[:2])


def stored(file: str, name: str, value: Any) -> Stored:
    """What an entry of a torch file is. A tensor may claim to be larger than its file: such a one is no weight."""
    if not isinstance(value, Tensor):
        return Stored(file, name, type(value).__name__, ())
    if value.is_nested or value.layout is not torch.strided:
        return Stored(file, name, "a tensor of another layout than strided", ())
    if value.is_meta or value.untyped_storage().nbytes() < value.nbytes:
        return Stored(file, name, f"a tensor with fewer numbers than its shape {list(value.shape)}", ())
    return Stored(file, name, value.dtype, tuple(value.shape))


def misfits(wanted: dict[str, tuple[int, ...]], found: Iterable[Stored], only: torch.dtype | None,
            where: str = "", kinds: Mapping[str, torch.dtype] = MappingProxyType({})) -> list[str]:
    """A line for every weight that is missing, unknown, there twice, of another shape, of no dtype for weights, or of
    another dtype than `only` (None takes all, to be cast); those in `kinds` are to be of the dtype there. `where` says
    in which file a missing one should be.
    """
    wrong, seen = [], {}
    for entry in found:
        kind = kinds.get(entry.name)
        given = f"{spelled(entry.kind)}{list(entry.shape)}" if entry.kind in {*DTYPES, kind} else spelled(entry.kind)
        if entry.name in seen:
            wrong.append(f"duplicate: {entry.name} in {seen[entry.name]} and in {entry.file}")
        elif entry.name not in wanted:
            wrong.append(f"unknown: {entry.name} in {entry.file}")
        elif entry.kind not in (DTYPES if kind is None else (kind,)) or entry.shape != wanted[entry.name]:
            wrong.append(f"{entry.name} in {entry.file}: should be {'' if kind is None else spelled(kind)}"
                         f"{list(wanted[entry.name])}, is {given}")
        elif kind is None and only not in (None, entry.kind):
            wrong.append(f"{entry.name} in {entry.file}: is {given} among {spelled(only)}; load it with a dtype")
        seen.setdefault(entry.name, entry.file)
    return [f"missing: {name}{where}" for name in wanted if name not in seen] + wrong


def usual_dtype(found: Iterable[Stored]) -> torch.dtype:
    """The dtype of most tensors."""
    kinds = Counter(entry.kind for entry in found if entry.kind in DTYPES)
    return kinds.most_common(1)[0][0] if kinds else torch.float32


def spelled(kind: torch.dtype | str) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(kind).removeprefix("torch.")
