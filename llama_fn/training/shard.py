"""A file of tokens: written once, then mapped into memory.

    256 bytes    the header: magic, version, bytes of a token, numbers of tokens, documents and learned flags, SHA-256
                 of the tokenizer, SHA-256 of all that follows the header; zeros; SHA-256 of the bytes up to here
    tokens       their ids, as integers of 16 or 32 bits
    ends         where each document ends, counted in tokens, as integers of 64 bits
    learned      one byte a token, 1 if it is learned; only if some token is not

All integers are unsigned, and their lowest byte comes first. The header's own digest is checked at every opening, so a
flipped bit in it is found. A flipped bit in the rest is found by the other digest, which takes reading all of it.
"""

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_fn.checkpoint.atomic import replacing
from llama_fn.tokenizer import Tokenizer
from llama_fn.training.encode import Encoded

MAGIC, VERSION = b"LLAMA_FN", 1
FIELDS = struct.Struct("<8sIIQQQ32s32s")
HEADER, DIGEST = 256, 32  # bytes
SPOOLED = 1 << 24  # bytes of learned flags that are kept in memory while a file is written


class Shard(NamedTuple):
    """The tokens of all documents "n", where each document ends "m", and which tokens are learned "n"; None if all."""

    tokens: np.ndarray
    ends: np.ndarray
    learned: np.ndarray | None


def tokenizer_digest(tokenizer: Tokenizer) -> bytes:
    """The SHA-256 of what decides about ids: of ``tokenizer.model``, and of added tokens if there are any."""
    digest = hashlib.sha256(tokenizer.model)
    if tokenizer.added:
        digest.update(repr((tokenizer.added, tokenizer.special, tokenizer.legacy)).encode())
    return digest.digest()


def write_shard(path: str | os.PathLike, tokenizer: Tokenizer, documents: Iterable[Encoded]) -> int:
    """Write documents that the tokenizer encoded to a file, atomically, and return the number of tokens.

    Only one document is in memory at a time. Raises `OSError` that names the file and a remedy.
    """
    kind, ends, count, whole = _dtype(tokenizer), bytearray(), 0, hashlib.sha256()
    with (replacing(path) as beside, beside.open("wb") as file,
          tempfile.SpooledTemporaryFile(SPOOLED, dir=str(beside.parent)) as flags):

        def write(data: bytes) -> None:
            whole.update(data)
            file.write(data)

        file.write(bytes(HEADER))
        for tokens, learned in documents:
            write(tokens.astype(kind).tobytes())
            if learned is not None and not flags.tell():  # the first document with tokens that are not learned
                _write_ones(flags, count)
            if learned is not None or flags.tell():
                flags.write((np.ones(len(tokens), np.uint8) if learned is None else learned).astype(np.uint8).tobytes())
            count += len(tokens)
            ends += struct.pack("<Q", count)
        write(bytes(ends))
        flagged = flags.tell()
        flags.seek(0)
        while block := flags.read(1 << 20):
            write(block)
        fields = FIELDS.pack(MAGIC, VERSION, kind.itemsize, count, len(ends) // 8, flagged,
                             tokenizer_digest(tokenizer), whole.digest()).ljust(HEADER - DIGEST, b"\0")
        file.seek(0)
        file.write(fields + hashlib.sha256(fields).digest())
    return count


def open_shard(path: str | os.PathLike, tokenizer: Tokenizer, check: bool = True) -> Shard:
    """Map a file of `write_shard` into memory.

    The header and the file's length are always checked; with ``check`` the digest of the whole is, too. Raises
    `FileNotFoundError`, and `ValueError` that names the file and what is wrong: it is empty, cut, damaged, of another
    kind, or of another tokenizer.
    """
    path = Path(path)
    with path.open("rb") as file:
        header, size = file.read(HEADER), os.fstat(file.fileno()).st_size
        if not size:
            raise ValueError(f"{path}: empty; remove it, and it is made again from the texts")
        if header[:len(MAGIC)] != MAGIC[:len(header)]:
            raise ValueError(f"{path}: not a file of tokens, or an early one: it does not begin with "
                             f"{MAGIC.decode()!r}; remove it, and it is made again from the texts")
        if len(header) < HEADER:
            raise ValueError(f"{path}: cut: {size} bytes, and the header alone has {HEADER}; remove it, and it is made "
                             "again from the texts")
        if hashlib.sha256(header[:-DIGEST]).digest() != header[-DIGEST:]:
            raise _damaged(path, "its header has another digest than it says")
        _, version, width, count, documents, flags, of_tokenizer, digest = FIELDS.unpack_from(header)
        if version != VERSION:
            raise ValueError(f"{path}: a file of tokens of version {version}; this program reads version {VERSION}")
        if (expected := HEADER + count * width + documents * 8 + flags) != size:
            raise _damaged(path, f"{size:,} bytes, and its header says {expected:,}")
        if of_tokenizer != tokenizer_digest(tokenizer):
            raise ValueError(f"{path}: encoded by another tokenizer; remove it, and it is made again from the texts")
        if check and hashlib.file_digest(file, "sha256").digest() != digest:
            raise _damaged(path, "its tokens have another digest than its header says")
    if not count:
        return Shard(np.empty(0, np.uint16), np.empty(0, np.uint64), None)
    ends_at = HEADER + count * width
    return Shard(np.memmap(path, f"<u{width}", "r", HEADER, (count,)),
                 np.memmap(path, "<u8", "r", ends_at, (documents,)),
                 np.memmap(path, "u1", "r", ends_at + documents * 8, (count,)) if flags else None)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: damaged: {why}; remove it, and it is made again from the texts")


def _write_ones(file: tempfile.SpooledTemporaryFile, count: int) -> None:
    for at in range(0, count, 1 << 20):
        file.write(b"\1" * min(1 << 20, count - at))


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    """The dtype of token ids in the file."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
