"""The frequencies of RoPE for kernels of a whole step, computed once."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from llama_fn.model.rope import frequencies
from llama_fn.modes import recording

_known: dict[tuple, Tensor] = {}


def known_frequencies(*what: Any) -> Float[Tensor, "p"]:
    """`frequencies`, computed once, for kernels of one token: eight operations, which take as long as all layers' norms
    (CPU). What a GPU records is not there yet, so that it is not kept.
    """
    if what in _known:
        return _known[what]
    found = frequencies(*what)
    if type(found) is Tensor and not recording(found):
        _known[what] = found
    return found
