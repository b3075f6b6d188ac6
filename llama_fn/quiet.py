"""Torch's warnings about its own inside, which no caller causes or can help, stay unsaid (torch 2.13, 2.14)."""

import warnings

# Each is told by its message, its category and the module that it comes from.
OWN = (
    # The first forward mode of a process scripts formulas, the first compilation imports a class of scripted methods.
    # (Torch 2.14 calls that a FutureWarning.)
    *((r"`torch\.jit\.script(_method)?` is (deprecated|not supported)", category, r"torch\.jit\._script")
      for category in (DeprecationWarning, FutureWarning)),
    # The diagonal that `jacrev`, `jacfwd` and `hessian` take of their basis, compiled: inductor's check of its axes.
    (r"`torch\._prims_common\.check` is deprecated", FutureWarning, r"torch\._inductor\.lowering"),
    # The cosines and sines of RoPE, computed as complex numbers, once.
    ("Torchinductor does not support code generation for complex operators", UserWarning,
     r"torch\._inductor\.lowering"),
    # A constant of a graph that `linearize` computes at once.
    ("Attempted to insert a get_attr Node with no underlying reference", UserWarning,
     r"torch\.fx\.experimental\.const_fold"),
)


def ignore() -> None:
    """Put these filters before all others. The package does so when it is imported."""
    for message, category, module in OWN:
        warnings.filterwarnings("ignore", message, category, module)


ignore()
