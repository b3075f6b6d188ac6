"""``metrics.jsonl``: the measurements of a run, one in each line. Lines are appended and never changed.

A snapshot knows the length and the digest of the file at its step. A run that resumes from a snapshot keeps exactly
those bytes.
"""

import contextlib
import hashlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

from llama_fn.checkpoint.atomic import replacing
from llama_fn.checkpoint.write_errors import explaining_errors
from llama_fn.text import characters, parse

METRICS = "metrics.jsonl"


class MetricsFile:
    """An open ``metrics.jsonl``, and the length and digest of its contents.

    What cannot be written (the disk is full) waits in memory and is written later.
    """

    def __init__(self, path: Path, kept: bytes) -> None:
        """Open the file, whose contents become ``kept``. Other contents are replaced atomically."""
        self.path, self.length, self.hash, self.waiting = path, len(kept), hashlib.sha256(kept), b""
        self.failed = False
        if not (path.is_file() and path.read_bytes() == kept):
            with replacing(path) as temporary:
                temporary.write_bytes(kept)
        with explaining_errors(path):
            self.handle = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, measurement: dict[str, Any]) -> None:
        """Append a line. If the disk does not take it, the first such failure in a row is a warning.

        Numbers that are not finite become null, because JSON has no other word for them.
        """
        line = (json.dumps(_finite(measurement)) + "\n").encode()
        self.waiting += line
        self.length += len(line)
        self.hash.update(line)
        try:
            self.flush()
        except OSError as error:
            if not self.failed:
                warnings.warn(f"{self.path}: {error.strerror}; the run goes on, and its measurements wait in memory",
                              stacklevel=3)
            self.failed = True

    def flush(self) -> None:
        """Pass all lines to the operating system. Raises `OSError` that names the file and a remedy."""
        with explaining_errors(self.path):
            while self.waiting:
                self.waiting = self.waiting[os.write(self.handle, self.waiting):]
        self.failed = False

    def extent(self) -> dict[str, Any]:
        """The number of bytes and their digest, for the manifest of a snapshot."""
        return {"bytes": self.length, "sha256": self.hash.hexdigest()}

    def close(self) -> None:
        """Write what waits, if that is possible, and close the file."""
        with contextlib.suppress(OSError):
            self.flush()
        os.close(self.handle)


def _finite(x: Any) -> Any:
    """The value with None in the place of every number that is not finite."""
    if isinstance(x, dict):
        return {name: _finite(part) for name, part in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(part) for part in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def kept_metrics(path: Path, extent: dict[str, Any]) -> bytes:
    """The contents of ``metrics.jsonl`` up to a snapshot, whose manifest has their ``extent``.

    A missing file gets a warning. Raises `ValueError` for other contents.
    """
    if not path.is_file() and extent["bytes"]:
        warnings.warn(f"{path} is missing: the run goes on without its earlier measurements", stacklevel=3)
        return b""
    kept = path.read_bytes()[:extent["bytes"]] if extent["bytes"] else b""
    if len(kept) < extent["bytes"] or hashlib.sha256(kept).hexdigest() != extent["sha256"]:
        raise ValueError(f"{path}: damaged, or not of this run (its digest is not that in the snapshot); put the right "
                         "file there, or remove it: then the run goes on without its earlier measurements")
    return kept


def lines_until(path: Path, step: int) -> bytes:
    """The lines up to a step, for a run whose snapshot has no extent. An incomplete last line is left out.

    Raises `ValueError` that names the line, for a line that no training run wrote.
    """
    kept = b""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else (), 1):
        if line.endswith(b"}\n"):
            where = f"{path}, line {number}"
            measurement = parse(characters(line, where), where)
            if not isinstance(measurement, dict) or not isinstance(measurement.get("step"), int):
                raise ValueError(f"{where}: not what a training run writes there")
            if measurement["step"] <= step:
                kept += line
    return kept
