"""`Weights`: the names, shapes and dtypes of a model's weights, and a function that reads one weight.

Every format consists of two functions. One opens a folder and returns `Weights`; the other writes `Weights` to a
folder. Loading opens a folder and reads every weight. Converting opens one format and writes another, one weight at a
time, so that the model is never in memory as a whole.
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
from llama_fn.mesh.shard import unshard_leaf
from llama_fn.mesh.sharded import is_sharded
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params
from llama_fn.ops.weight import whole_shape

HEAD_AXES = ("k", "g", "h")  # key/value heads, query heads of each, the width of a head
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ReportBytes = Callable[[int], None]


def check_dtype(dtype: Any) -> None:
    """Raise `ValueError` for a dtype that weights cannot be cast to."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None (as stored) or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")


class Stored(NamedTuple):
    """One entry of a file. ``kind`` is a tensor's dtype; for anything else it is a text that says what the entry is."""

    file: str
    name: str
    kind: torch.dtype | str
    shape: tuple[int, ...]


class Weights(NamedTuple):
    """What is known about a model's weights before any number is read, and how to read them.

    ``read(path)`` returns the weight at a path of the tree `Params`, for example "blocks.0.attention.wq", in the dtype
    ``dtype``. Of weights in files, ``read(path, part)`` returns a part (`Part`) of it, and reads no other; that tensor
    may lie in the mapped file and have the dtype that is stored, so that the caller copies it. ``stored`` lists the
    entries of the files. ``problems`` are reasons not to load the weights, and ``notes`` deserve a warning. If ``tied``
    is true, the embedding and the output are one matrix. ``bits`` names what the matrices are quantized to ("int8" or
    "int4"); it is empty for plain tensors.
    """

    config: Config
    read: Callable[..., Any]
    dtype: torch.dtype
    stored: list[Stored]
    problems: list[str] = []  # noqa: RUF012, it is never changed
    notes: list[str] = []  # noqa: RUF012
    tied: bool = False
    bits: str = ""

    def unquantized(self, where: str) -> "Weights":
        """These weights. Raises `ValueError` if they are quantized, which the format named ``where`` cannot hold."""
        if self.bits:
            raise ValueError(f"{where} cannot hold quantized weights ({self.bits}): write them in the format meta, in "
                             "one file, or turn them into plain tensors first: lf.dequantize(params)")
        return self

    def checked(self, where: Any) -> "Weights":
        """These weights, after a warning for each note. Raises `ValueError` that lists all problems, if any."""
        for note in self.notes:
            warnings.warn(note, stacklevel=3)
        if self.problems:
            raise ValueError(f"{where}: {len(self.problems)} weights do not fit the settings:\n  "
                             + "\n  ".join(self.problems))
        return self


def weights_of(params: Params, dtype: torch.dtype | None = None) -> Weights:
    """The weights of a tree in memory. Each tensor is cast to ``dtype`` when it is read; None keeps its own dtype.

    Quantized weights are never cast. A sharded weight is gathered when it is read, so that all processes must read the
    same weights in the same order. Raises `ValueError` for wrong shapes, and for adapters that are not merged.
    """
    check_dtype(dtype)
    leaves: dict[str, Any] = dict(quantized.joined(tree.paths(params, is_sharded)))
    abstract = tree.paths(abstract_params(params.config))
    for path in [path for path in leaves if path not in abstract]:
        if other := next((name for name in abstract if path.startswith(f"{name}.")), None):
            raise ValueError(f"{other} is not a plain tensor, and files hold plain tensors only; merge an adapter "
                             "first: use lora.merge in place of lora.apply (on lf.dequantize(params) if the weights "
                             "are quantized)")
    shapes = [{path: list(whole_shape(x)) for path, x in weights.items()} for weights in (abstract, leaves)]
    wrong = [f"{path}: should be {shapes[0].get(path)}, is {shapes[1].get(path)}"
             for path in abstract | leaves if shapes[0].get(path) != shapes[1].get(path)]
    if wrong:
        raise ValueError("the parameters do not fit their config:\n  " + "\n  ".join(wrong))

    def read(path: str) -> Any:
        leaf: Any = leaves[path]
        leaf = unshard_leaf(leaf) if is_sharded(leaf) else leaf
        return leaf.detach().to(dtype) if isinstance(leaf, Tensor) else leaf

    plain: dict[str, Any] = {path: getattr(x, "local", x) for path, x in leaves.items()}
    return Weights(params.config, read, dtype or params.embedding.dtype, [],
                   tied=isinstance(plain["output"], Tensor) and share_memory(plain["embedding"], plain["output"]),
                   bits=quantized.bits(x.values.dtype for x in plain.values() if not isinstance(x, Tensor)))


def params_of(weights: Weights, device: torch.device | str | None = None,
              convert: Callable[[str, Weight, Tensor], Any] = lambda path, weight, x: x) -> Params:
    """Read all weights into a tree, on ``device``.

    ``convert(path, abstract weight, weight)`` is applied to each weight as soon as it is read, and its result is what
    the tree holds. `load` quantizes in this way, so that only one unquantized weight is in memory at a time.
    """
    def leaf(path: str, weight: Weight) -> Any:
        return convert(path, weight, tree.map(lambda x: x.to(device), weights.read(path)))

    params = tree.map_with_path(leaf, abstract_params(weights.config))
    return params._replace(output=params.embedding) if weights.tied and isinstance(params.output, Tensor) else params


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape begin at the same address. Tensors on the meta device have no address."""
    return a is b or (a.device.type != "meta" and a.data_ptr() == b.data_ptr() and a.shape == b.shape)


def equal_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and equal numbers. Dtypes may differ, and NaN equals NaN here."""
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | a.isnan() & b.isnan()).all()))


def flat_shape(weight: Weight) -> tuple[int, ...]:
    """The shape of a weight as a matrix: neighboring axes of heads become one.

    "k g h d" becomes (k * g * h, d), and "d k g h" becomes (d, k * g * h).
    """
    sizes, last = [], ""
    for axis, size in zip(weight.axes.split(), weight.shape, strict=True):
        if axis in HEAD_AXES and last in HEAD_AXES:
            sizes[-1] *= size
        else:
            sizes.append(size)
        last = axis
    return tuple(sizes)


def layer_of(path: str) -> str:
    """The layer of a weight: "blocks.3" for "blocks.3.attention.wq". A weight outside the layers is its own layer."""
    return ".".join(path.split(".")[:2])


def stored(file: str, name: str, value: Any) -> Stored:
    """Describe one entry of a torch file.

    A tensor that is sparse, nested, or larger than its storage gets a text as its ``kind``, and is therefore never
    accepted as a weight.
    """
    if not isinstance(value, Tensor):
        return Stored(file, name, type(value).__name__, ())
    if value.is_nested or value.layout is not torch.strided:
        return Stored(file, name, "a tensor of another layout than strided", ())
    if value.is_meta or value.untyped_storage().nbytes() < value.nbytes:
        return Stored(file, name, f"a tensor with fewer numbers than its shape {list(value.shape)}", ())
    return Stored(file, name, value.dtype, tuple(value.shape))


def misfits(wanted: dict[str, tuple[int, ...]], found: Iterable[Stored], only: torch.dtype | None,
            where: str = "", kinds: Mapping[str, torch.dtype] = MappingProxyType({})) -> list[str]:
    """One line for every difference between the weights that are wanted and the entries that were found.

    A weight may be missing, unknown, duplicate, or of a wrong shape or dtype. ``only`` is the dtype that all weights
    must have; None accepts every dtype in `DTYPES`. ``kinds`` gives the dtype of single weights by their names.
    ``where`` names the file in which a missing weight should be.
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
    """The dtype that most of the tensors have; float32 if there are none."""
    kinds = Counter(entry.kind for entry in found if entry.kind in DTYPES)
    return kinds.most_common(1)[0][0] if kinds else torch.float32


def spelled(kind: torch.dtype | str) -> str:
    """The name of a dtype without its module: "bfloat16" for ``torch.bfloat16``."""
    return str(kind).removeprefix("torch.")
