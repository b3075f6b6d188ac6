"""A model in eight bits: parameters like any others to `forward` and to generation, and half as large as bfloat16's."""

from typing import Any, Literal

from torch import Tensor

from llama_fn import tree
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.quantized import Quantized, dequantized, quantized
from llama_fn.model.transformer import Params
from llama_fn.shapes import typed

Bits = Literal["int8"]


@typed
def quantize(params: Params, bits: Bits = "int8") -> Params:
    """The parameters with every matrix in 8-bit integers and a scale an output (symmetric, rounded to nearest).

    The embedding, of which a row is read at a time, and the norms stay as they are. Nothing trains integers: take
    gradients by an adapter on top of them (`lora.apply`), or by activations. Raises `ValueError` for other bits than
    "int8", for what is quantized already, and for weights that are not finite, each by its path.
    """
    check_bits(bits)
    return tree.map_with_path(quantized_leaf, abstract_params(params.config), params)


@typed
def dequantize(params: Params) -> Params:
    """The parameters that quantized ones stand for, as tensors of the embedding's dtype."""
    def plain(weight: Weight, x: Any) -> Tensor:
        return dequantized(x, params.embedding.dtype) if isinstance(x, Quantized) else x

    return tree.map(plain, abstract_params(params.config), params)


def quantized_leaf(path: str, weight: Weight, x: Any) -> Any:
    """One weight of `quantize`, as it is or quantized."""
    if path == "embedding" or weight.std is None:
        return x
    if not isinstance(x, Tensor):
        raise ValueError(f"{path} is no tensor but {type(x).__name__}: quantize the parameters from before")
    try:
        return quantized(x, len(weight.outer))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_bits(bits: Any) -> None:
    """Raise `ValueError` for a kind of numbers that weights are not kept in."""
    if bits != "int8":
        raise ValueError(f"weights are quantized to 'int8', got {bits!r}")
