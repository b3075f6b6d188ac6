"""Filters for warnings of torch about its own code, which no caller causes or can avoid (torch 2.13 and 2.14)."""

import warnings

# The message, the category and the module of each warning.
OWN = (
    # Torch scripts formulas at the first use of forward mode and at the first compilation. (It warns of that by a
    # DeprecationWarning in 2.13, and by a FutureWarning in 2.14.)
    *((r"`torch\.jit\.script(_method)?` is (deprecated|not supported)", category, r"torch\.jit\._script")
      for category in (DeprecationWarning, FutureWarning)),
    # Inductor checks the axes of a diagonal, which `jacrev`, `jacfwd` and `hessian` take when they are compiled.
    (r"`torch\._prims_common\.check` is deprecated", FutureWarning, r"torch\._inductor\.lowering"),
    # RoPE's cosines and sines are computed as complex numbers (see `model/rope.py`).
    ("Torchinductor does not support code generation for complex operators", UserWarning,
     r"torch\._inductor\.lowering"),
    # `linearize` computes constants of its graph in advance.
    ("Attempted to insert a get_attr Node with no underlying reference", UserWarning,
     r"torch\.fx\.experimental\.const_fold"),
)


def ignore() -> None:
    """Put these filters before all others; the package does so when it is imported."""
    for message, category, module in OWN:
        warnings.filterwarnings("ignore", message, category, module)


ignore()
