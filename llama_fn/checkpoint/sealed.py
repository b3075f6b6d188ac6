"""JSON objects that carry their own digest, so that a reader finds a single flipped bit in them."""

import hashlib
import json
from pathlib import Path
from typing import Any

CHECKSUM = "checksum"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with one more entry, ``checksum``: the SHA-256 of all other entries."""
    return {**value, CHECKSUM: _digest(value)}


def unsealed(value: dict[str, Any], where: Path) -> dict[str, Any]:
    """The object without its checksum. Raises `ValueError` that names the file if the checksum is not that of it."""
    rest = {name: x for name, x in value.items() if name != CHECKSUM}
    if value.get(CHECKSUM) != _digest(rest):
        raise ValueError(f"{where}: damaged, or edited: its checksum is not that of its entries")
    return rest


def _digest(value: dict[str, Any]) -> str:
    """The SHA-256 of an object. It does not depend on white space or on the order of the entries."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
