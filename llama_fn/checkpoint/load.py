"""`load` and `save`: a model's parameters and tokenizer, from and to a folder in any of the formats."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from llama_fn import tree
from llama_fn.checkpoint import chat_files, huggingface, llama2c, meta
from llama_fn.checkpoint.atomic import current, replacing_folder
from llama_fn.checkpoint.divided import sharded_params, write_together
from llama_fn.checkpoint.files import is_torch_file
from llama_fn.checkpoint.tokenizer_files import FILES as TOKENIZER_FILES
from llama_fn.checkpoint.tokenizer_files import read_tokenizer, write_tokenizer
from llama_fn.checkpoint.weights import ReportBytes, Weights, check_dtype, params_of, weights_of
from llama_fn.checkpoint.write_errors import explaining_errors
from llama_fn.mesh.plan import Plan, default_plan
from llama_fn.mesh.ranks import ranks_of
from llama_fn.mesh.shard import sizes_of
from llama_fn.model.transformer import Params
from llama_fn.ranges import integer
from llama_fn.tokenizer import Tokenizer
from llama_fn.transforms.quantize import Bits, quantized_leaf

STORIES = Path(__file__).parent.parent / "stories"
EMBEDDED = {"stories": STORIES / "model", "stories-draft": STORIES / "draft"}
TOKENIZER = "tokenizer.model"
Format = Literal["meta", "hf", "llama2c"]
MaybeNone: TypeAlias = Any  # None is possible, but type checkers let every use pass (typeshed does so too)
# A folder is in a format if it holds this file.
MARKERS: dict[Format, str] = {"meta": meta.SETTINGS, "hf": huggingface.SETTINGS, "llama2c": llama2c.WEIGHTS}


class Model(NamedTuple):
    """A language model: its parameters and its tokenizer.

    The tokenizer is None if no tokenizer lies with the weights. `Model` is a tuple, so that
    ``params, tokenizer = lf.load("stories")`` works, and ``model._replace(tokenizer=other)`` gives another model.

    >>> params, tokenizer = lf.load("stories")
    """

    params: Params
    tokenizer: Tokenizer | MaybeNone


def check_tokenizer(model: Model) -> None:
    """Raise `ValueError` if the model has no tokenizer. Every function that needs text calls this."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, for none lies with its weights; give it one: "
                         "model._replace(tokenizer=lf.load_tokenizer(path))")


def load(path_or_name: str | os.PathLike[str], *, dtype: torch.dtype | None = None,
         device: torch.device | str | None = None, quantize: Bits | None = None, mesh: DeviceMesh | None = None,
         plan: str | Plan | None = None) -> Model:
    """Load a model from a folder, or load an embedded model by its name.

    ``path_or_name`` is the string "stories" (an embedded model), the string "stories-draft" (a smaller one, to draft
    for it), or a folder in Meta's, Hugging Face's or llama2.c's format. The formats are told apart by their files.
    Give the folder, not one of its files; only a file of llama2.c may be given itself. What `save` wrote is loaded bit
    for bit.

    ``dtype`` None keeps the dtype in the files. Then the weights of a single file of Meta's format are mapped, not
    copied: the operating system reads each page from the disk when it is first used. Any other ``dtype`` casts the
    weights one by one.

    ``quantize`` "int8" or "int4" gives the same model as `quantize`, but converts one weight at a time, so that the
    unquantized model is never in memory as a whole. A model that was saved quantized stays quantized; ``dtype`` then
    applies to its embedding and norms.

    The tokenizer is read from the same folder, or from its parent, as in Meta's download. If there is none, the
    model's tokenizer is None. The weights may have more rows than the tokenizer has tokens. The additional rows are
    added tokens, or padding that decodes to an empty text.

    With a ``mesh`` (of `lf.mesh.make_mesh`), each process reads its own parts of the weights alone, as ``plan`` divides
    them: the name of a preset or a dict, see `lf.mesh.shard`; None is the preset for the mesh's axes. The parameters
    are those that `lf.mesh.shard` makes of the whole model, bit for bit, and are copied, not mapped. Quantized weights
    need a plan that gathers none of them: "replicated", "tensor" or "replicated+tensor".

    Raises `FileNotFoundError` for a missing file. Raises one `ValueError` that names the file and everything that is
    wrong with it.

    >>> params, tokenizer = lf.load("stories", dtype=torch.bfloat16)
    """
    if plan is not None and mesh is None:
        raise ValueError("load: a plan divides the weights over a mesh; give the mesh, too (lf.mesh.make_mesh)")
    convert = [] if quantize is None else [quantized_leaf(quantize)]
    format, place = find(path_or_name)
    weights = open_weights(format, place, dtype).checked(place)
    check_not_quantized(weights, quantize, place)
    tokenizer = open_tokenizer(place, weights)
    if mesh is not None:
        plan = default_plan(sizes_of(mesh)) if plan is None else plan
        return Model(sharded_params(weights, mesh, plan, device, *convert), tokenizer)
    return Model(params_of(weights, device, *convert), tokenizer)


def save(model: Model, path: str | os.PathLike[str], *, format: Format = "meta", shards: int | None = None,
         dtype: torch.dtype | None = None) -> None:
    """Write a model to a folder, from which `load` reads it back.

    With ``dtype`` None the model comes back bit for bit; any other ``dtype`` casts the weights. ``format`` is one of:

    - "meta": Meta's format, in ``shards`` files (None means one).
    - "hf": Hugging Face's format, which transformers reads, in ``shards`` files (None means files of about 5 GB).
    - "llama2c": llama2.c's format, which its program ``run.c`` reads. It is one file in float32.

    Quantized weights can only be written as "meta" in one file, and only `load` reads them. A tokenizer that is None
    is not written. "hf" warns if transformers would encode some texts differently from this tokenizer; "llama2c"
    refuses a tokenizer that ``run.c`` would use wrongly.

    The write is atomic. When `save` returns, the model is on the disk. If `save` fails, is killed, or the power fails,
    `load` reads either the model that was there before or the new one. After a successful `save`, no file of the old
    model is left.

    All processes of a mesh must save a sharded model together. Rank 0 writes it, and an error there is raised by all.
    Every process has one whole weight in memory at a time, and rank 0 all weights of one file: choose ``shards``.

    Raises `ValueError` for a folder that holds a model in another format, and for a model that the format cannot hold.
    Raises `OSError` that names the file and a remedy if the disk is full or writing is not permitted.

    >>> lf.save(model, "my-copy", format="hf")
    """
    shards = None if shards is None else integer("save: shards", shards)
    weights, ranks = weights_of(model.params, dtype), ranks_of(model.params)
    if ranks.size > 1:
        write_together(weights, ranks, lambda parts: write(parts, model.tokenizer, path, format, shards))
    else:
        write(weights, model.tokenizer, path, format, shards)


def find(path_or_name: str | os.PathLike[str]) -> tuple[Format, Path]:
    """The format of a model, and its folder; for llama2.c's format, its file instead of a folder."""
    path = Path(path_or_name)
    path = newer if (newer := current(path.parent) / path.name).is_file() else current(path)
    found: list[Format] = [format for format, name in MARKERS.items() if (path / name).is_file()]
    if isinstance(path_or_name, str) and path_or_name in EMBEDDED:
        if found:
            raise ValueError(f"{path_or_name} is an embedded model and a folder here; "
                             f"for the folder say ./{path_or_name}")
        return "meta", EMBEDDED[path_or_name]
    if path.is_file() and path.suffix == ".bin":
        if is_torch_file(path):
            raise ValueError(f"{path_or_name}: a file of PyTorch's, and no checkpoint of llama2.c's; give the folder "
                             f"that holds it and {huggingface.SETTINGS}: {Path(path_or_name).parent}")
        return "llama2c", path
    if not found:
        raise FileNotFoundError(f"{path_or_name}: no model there: expected the name of an embedded model "
                                f"({', '.join(EMBEDDED)}), or a folder with {meta.SETTINGS} (Meta's), "
                                f"{huggingface.SETTINGS} (Hugging Face's) or {llama2c.WEIGHTS} (llama2.c's)")
    if len(found) > 1:
        raise ValueError(f"{path}: models in the formats {' and '.join(found)} lie there together, by "
                         f"{' and '.join(MARKERS[format] for format in found)}; put each in a folder of its own")
    return found[0], path / llama2c.WEIGHTS if found[0] == "llama2c" else path


def open_weights(format: Format, place: Path, dtype: torch.dtype | None = None) -> Weights:
    """Open the model that `find` found. No weight is read yet."""
    check_dtype(dtype)
    opener = {"meta": meta.open_meta, "hf": huggingface.open_hf, "llama2c": llama2c.open_llama2c}[format]
    return opener(place, dtype)


def check_not_quantized(weights: Weights, bits: Bits | None, place: Path) -> None:
    """Raise `ValueError` if ``bits`` asks to quantize weights that are quantized already."""
    if bits is not None and weights.bits:
        raise ValueError(f"{place}: its weights are quantized already, to {weights.bits}; leave quantize out, or "
                         "quantize the model that they were made of")


def open_tokenizer(place: Path, weights: Weights) -> Tokenizer | None:
    """The tokenizer of a model, with its chat template and end tokens; None if there is no tokenizer.

    Raises `ValueError` if the tokenizer has more tokens than the weights have rows.
    """
    folder = place if place.is_dir() else place.parent
    tokenizer = read_tokenizer(folder, weights.config.vocab_size)
    return None if tokenizer is None else chat_files.read_chat(tokenizer, folder)


def write(weights: Weights, tokenizer: Tokenizer | None, path: str | os.PathLike, format: Format,
          shards: int | None = None, report: ReportBytes = lambda _: None) -> None:
    """Write weights to a folder, one weight at a time, and the tokenizer unless it is None.

    ``report`` is called with the number of bytes of each write. Raises the errors of `save`.
    """
    writers = {"meta": (meta.write_meta, meta.FILES), "hf": (huggingface.write_hf, huggingface.FILES),
               "llama2c": (llama2c.write_llama2c, llama2c.FILES)}
    if format not in writers:
        raise ValueError(f"unknown format {format!r}, only {', '.join(map(repr, writers))} are known")
    with explaining_errors(Path(path)):
        others = [name for other, name in MARKERS.items() if other != format and (current(path) / name).exists()]
    if others:
        raise ValueError(f"{path}: a model in another format lies there ({others[0]}); choose a folder of its own")
    writer, files = writers[format]
    weights = weights._replace(read=functools.partial(_on_cpu, weights.read))
    with replacing_folder(path, (*files, *TOKENIZER_FILES, *chat_files.FILES)) as temporary:
        if tokenizer is not None:
            write_tokenizer(tokenizer, temporary, weights.config.max_seq_len, format == "hf")
            chat_files.write_chat(tokenizer, temporary, format == "hf")
        if tokenizer is not None and format == "llama2c":
            llama2c.write_vocabulary(tokenizer, weights.config.vocab_size, temporary / llama2c.VOCABULARY)
        writer(weights, temporary, shards, report)


def _on_cpu(read: Callable[[str], Any], path: str) -> Any:
    """Read a weight and copy it to the CPU."""
    return tree.map(Tensor.cpu, read(path))
