"""Parameters with 8-bit or 4-bit weights, which `forward` and generation take like any others."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from llama_fn import tree
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params
from llama_fn.ops.quantized import Grouped, Quantized, dequantized, grouped, quantized
from llama_fn.ops.weight import is_divided
from llama_fn.shapes import typed

Bits = Literal["int8", "int4"]


@typed
def quantize(params: Params, bits: Bits = "int8") -> Params:
    """The parameters with every matrix in integers, rounded to nearest; the embedding and the norms stay as they are.

    "int8" has a scale for each output (symmetric). "int4" has a scale and a minimum for each group of 64 inputs of each
    output. Integers are not trained: take gradients by an adapter (`lf.lora.apply`) or by activations.

    All devices of a mesh must call it together. Each then has its part of the same integers. Quantized weights are
    never gathered, so they need the plan "replicated", "tensor" or "replicated+tensor".

    Raises `ValueError`, with the path of the weight, for other ``bits``, for what is quantized already, for weights
    that are not finite, and for a plan that would gather them.

    >>> small = lf.quantize(params, "int8")
    """
    return tree.map_with_path(quantized_leaf(bits), abstract_params(params.config), params)


@typed
def dequantize(params: Params) -> Params:
    """The parameters with the rounded values of quantized weights as tensors, in the dtype of the embedding.

    >>> tensors = lf.dequantize(lf.quantize(params, "int8"))
    """
    def plain(weight: Weight, x: Any) -> Any:
        if is_divided(x):
            return x._replace(local=plain(weight, x.local))
        return dequantized(x, params.embedding.dtype) if isinstance(x, Quantized | Grouped) else x

    return tree.map(plain, abstract_params(params.config), params)


def is_matrix(path: str, weight: Weight) -> bool:
    """Whether `quantize` changes a weight: it does not change the embedding and the norms."""
    return path != "embedding" and weight.std is not None


def quantized_leaf(bits: Bits) -> Callable[[str, Weight, Any], Any]:
    """The function of path, abstract weight and tensor that `quantize` maps over the parameters.

    Raises `ValueError` for other bits than "int8" and "int4".
    """
    if bits not in ("int8", "int4"):
        raise ValueError(f"weights are quantized to 'int8' or 'int4', got {bits!r}")

    def leaf(path: str, weight: Weight, x: Any) -> Any:
        if not is_matrix(path, weight):
            return x
        if is_divided(x):
            return x.converted(path, weight, leaf)
        if not isinstance(x, Tensor):
            raise ValueError(f"{path} is no tensor but {type(x).__name__}: quantize the parameters from before")
        try:
            return (quantized if bits == "int8" else grouped)(x, len(weight.outer))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return leaf
