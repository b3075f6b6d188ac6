"""The linear map of a few rows by the kernels in C++."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from llama_fn.modes import by_layers
from llama_fn.ops.aten.inductor_sums import Flat
from llama_fn.ops.cpu import build as avx2
from llama_fn.ops.weight import values_alone
from llama_fn.shapes import typed


@typed
def by_cpp(weight: Flat, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    """`written_out` for a few rows on the CPU, by a kernel in C++ (see `ops/cpu`)."""
    return several_by_cpp([weight], x)[0]


def several_by_cpp(weights: Sequence[Flat], x: Tensor) -> list[Tensor]:
    """`by_cpp` of several weights of one kind, in one call."""
    ys = avx2.sums(weights, x.reshape(-1, x.shape[-1]))
    return [y.to(x.dtype).reshape(*x.shape[:-1], -1) for y in ys]


def accepts(weight: Flat, x: Tensor) -> bool:
    """Whether `by_cpp` computes these: in a step of `jit_layers`, so that eager code waits for no compiler."""
    return by_layers() and avx2.takes(weight, x) and values_alone(x)
