"""The checkpoint format of karpathy's llama2.c, version 0: seven integers, then all weights in float32.

llama2.c's program ``run.c`` reads the weights from ``model.bin`` and the vocabulary from ``tokenizer.bin``. The file
does not hold RoPE's base and RMSNorm's epsilon; ``run.c`` uses 10000 and 1e-5. Matrices have Meta's layout. All
matrices of one kind (``wq`` of layer 0, ``wq`` of layer 1, ...) follow one another.

Source: https://github.com/karpathy/llama2.c, ``run.c`` and ``export.py`` (``legacy_export``).
"""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint.files import inside
from llama_fn.checkpoint.parts import Part, whole_part
from llama_fn.checkpoint.weights import ReportBytes, Stored, Weights, flat_shape
from llama_fn.checkpoint.write_errors import explaining_errors
from llama_fn.config import Config
from llama_fn.model.init import abstract_params
from llama_fn.model.rope import rotation
from llama_fn.sentencepiece_model import settings_of
from llama_fn.tokenizer import Tokenizer

WEIGHTS, VOCABULARY = "model.bin", "tokenizer.bin"
FILES = (WEIGHTS, VOCABULARY)
MOST_LAYERS = 2**12  # a header that claims more could take much memory before its file is found too short
HEADER = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: untied), context
NEVER = -1e10  # a score so low that run.c never merges two pieces into this token
LAYER_WEIGHTS = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm",
         "feed_forward.w_gate", "feed_forward.w_down", "feed_forward.w_up")


def open_llama2c(file: Path, dtype: torch.dtype | None = None) -> Weights:
    """The weights of a ``.bin`` file, mapped into memory.

    Raises `FileNotFoundError` for a missing file, and `ValueError` for a file whose length does not match its header.
    """
    file = inside(file.parent, file.name)
    with file.open("rb") as begin:
        header = begin.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{file}: {len(header)} bytes are no checkpoint of llama2.c, whose header has {HEADER.size}")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = HEADER.unpack(header)
    try:
        config = Config(dim, n_layers, n_heads, n_kv_heads, abs(vocab_size), hidden_dim, max_seq_len=max_seq_len)
    except ValueError as error:
        raise ValueError(f"{file}: not a checkpoint of llama2.c (version 0): {error}") from None
    if n_layers > MOST_LAYERS:
        raise ValueError(f"{file}: not a checkpoint of llama2.c (version 0): {n_layers} layers, at most {MOST_LAYERS} "
                         "are read")
    tied, size = vocab_size > 0, file.stat().st_size
    wanted = HEADER.size + 4 * (config.n_params + max_seq_len * config.head_dim - tied * config.vocab_size * dim)
    if size != wanted:
        raise ValueError(f"{file}: its header implies {wanted} bytes, and it has {size}: damaged, or another version "
                         "than 0")
    offsets, offset, abstract = {}, HEADER.size, tree.paths(abstract_params(config))
    for path in _order(config, tied):
        offsets[path] = offset
        offset += 4 * (max_seq_len * config.head_dim if path == "rope" else math.prod(abstract[path].shape))
    offsets.setdefault("output", offsets["embedding"])

    def read(path: str, part: Part | None = None) -> Tensor:
        shape = abstract[path].shape
        # The mode "c" is copy on write: what is written to the tensor does not reach the file.
        numbers = torch.from_numpy(np.memmap(file, "<f4", "c", offset=offsets[path], shape=shape))
        return numbers.to(dtype) if part is None else numbers[part.within(whole_part(shape))]

    entries = [Stored(file.name, path, torch.float32, flat_shape(abstract[path])) for path in offsets
               if path != "rope" and not (tied and path == "output")]
    return Weights(config, read, dtype or torch.float32, entries, tied=tied)


def write_llama2c(weights: Weights, folder: Path, shards: int | None, report: ReportBytes) -> None:
    """Write ``model.bin``. Raises `ValueError` for a model that ``run.c`` would compute differently."""
    config = weights.unquantized("llama2.c's checkpoint").config
    if shards not in (None, 1):
        raise ValueError(f"llama2.c's checkpoint is one file, {shards} shards cannot be made")
    if (config.norm_eps, config.rope_theta, config.rope_scaling) != (1e-5, 10000.0, None):
        raise ValueError(f"run.c computes with norm_eps 1e-05 and rope_theta 10000, this model with {config.norm_eps} "
                         f"and {config.rope_theta}" + (f" and {config.rope_scaling}" if config.rope_scaling else ""))
    with explaining_errors(folder / WEIGHTS), (folder / WEIGHTS).open("wb") as file:
        file.write(HEADER.pack(config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads,
                               config.vocab_size if weights.tied else -config.vocab_size, config.max_seq_len))
        for path in _order(config, weights.tied):
            if path == "rope":  # cosines, then sines; run.c skips this table
                angles = rotation(torch.arange(config.max_seq_len, device="cpu"), config.head_dim, config.rope_theta)
                parts = [angles.cos, angles.sin]
            else:
                parts = [weights.read(path)]
            for x in parts:
                data = x.float().contiguous().numpy().astype("<f4", copy=False)
                file.write(data.data)  # the error of data.tofile(file) would not say that the disk is full
                report(data.nbytes)


def write_vocabulary(tokenizer: Tokenizer, vocab_size: int, file: Path) -> None:
    """Write ``tokenizer.bin``: the longest token's length in bytes, then score, length and bytes of every token.

    Raises `ValueError` for a tokenizer that ``run.c`` would use wrongly. ``run.c`` always puts a space before a text,
    uses 1 and 2 as begin and end tokens, and expects the 256 byte tokens from id 3 on.
    """
    processor, settings = tokenizer.processor, settings_of(tokenizer.model)
    wrong = settings.unusual() + ["dummy_prefix=False"] * (not settings.dummy_prefix)
    wrong += [f"{name}={id}" for name, id, usual in (("bos_id", tokenizer.bos_id, 1), ("eos_id", tokenizer.eos_id, 2),
                                                     ("the byte 0", processor.piece_to_id("<0x00>"), 3)) if id != usual]
    if wrong:
        raise ValueError(f"run.c would encode texts otherwise than this tokenizer, which has {', '.join(wrong)}; save "
                         "the model in another format, or without its tokenizer: model._replace(tokenizer=None)")
    tokens = []
    for id in range(vocab_size):
        if id in tokenizer.names or id >= processor.vocab_size():
            score, piece = NEVER, tokenizer.names.get(id, "")
        else:
            score, piece = processor.get_score(id), processor.id_to_piece(id)
        piece = {tokenizer.bos_id: "\n<s>\n", tokenizer.eos_id: "\n</s>\n"}.get(id, piece)
        tokens.append((score, piece.replace("\u2581", " ").encode()))
    with explaining_errors(file), file.open("wb") as out:
        out.write(struct.pack("<I", max(len(piece) for _, piece in tokens)))
        for score, piece in tokens:
            out.write(struct.pack("<fI", score, len(piece)) + piece)


def _order(config: Config, tied: bool) -> list[str]:
    """The paths of all weights in the order in which they lie in the file."""
    layers = [f"blocks.{i}.{kind}" for kind in LAYER_WEIGHTS for i in range(config.n_layers)]
    return ["embedding", *layers, "norm", "rope", *([] if tied else ["output"])]
