"""A model in eight or four bits: parameters like any others to `forward` and to generation, and smaller ones."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from llama_fn import tree
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params
from llama_fn.ops.quantized import Grouped, Quantized, dequantized, grouped, quantized
from llama_fn.shapes import typed

Bits = Literal["int8", "int4"]


@typed
def quantize(params: Params, bits: Bits = "int8") -> Params:
    """The parameters with every matrix in integers: "int8" with a scale an output (symmetric), "int4" with a scale and
    a minimum for each 64 inputs of each output; rounded to nearest.

    The embedding, of which a row is read at a time, and the norms stay as they are. Nothing trains integers: take
    gradients by an adapter on top of them (`lora.apply`), or by activations. Raises `ValueError` for other bits, for
    what is quantized already, and for weights that are not finite, each by its path.
    """
    return tree.map_with_path(quantized_leaf(bits), abstract_params(params.config), params)


@typed
def dequantize(params: Params) -> Params:
    """The parameters that quantized ones stand for, as tensors of the embedding's dtype."""
    def plain(weight: Weight, x: Any) -> Tensor:
        return dequantized(x, params.embedding.dtype) if isinstance(x, Quantized | Grouped) else x

    return tree.map(plain, abstract_params(params.config), params)


def is_matrix(path: str, weight: Weight) -> bool:
    """Whether `quantize` changes a weight: all but the embedding and the norms."""
    return path != "embedding" and weight.std is not None


def quantized_leaf(bits: Bits) -> Callable[[str, Weight, Any], Any]:
    """What `quantize` does with one weight, which it leaves as it is or quantizes: a function of path, weight, tensor.

    Raises `ValueError` for a kind of numbers that weights are not kept in.
    """
    if bits not in ("int8", "int4"):
        raise ValueError(f"weights are quantized to 'int8' or 'int4', got {bits!r}")

    def leaf(path: str, weight: Weight, x: Any) -> Any:
        if not is_matrix(path, weight):
            return x
        if not isinstance(x, Tensor):
            raise ValueError(f"{path} is no tensor but {type(x).__name__}: quantize the parameters from before")
        try:
            return (quantized if bits == "int8" else grouped)(x, len(weight.outer))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return leaf
