"""A stand-in for a weight, which measures the squared norm of the weight's gradient without keeping the gradient.

The gradient of a linear map's weight is g^T x, where x "t d" is the input and g "t o" the cotangent of the output. Its
squared norm is the sum of all elements of (x x^T) * (g g^T), the elementwise product of two matrices "t t" (Goodfellow
2015, "Efficient per-example gradient computations"; Li et al. 2022, "Large language models can be strong differentially
private learners", section 4). Where g^T x is smaller than these matrices, it is computed instead, squared and freed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.model.linear import linear
from llama_fn.model.transformer import embed
from llama_fn.modes import compiling, transforms
from llama_fn.ops.inside import clamped
from llama_fn.private import known_while_tracing
from llama_fn.shapes import typed

REMEDY = ("for such a loss, have whole gradients measured, one weight at a time, by wrapping the parameters in a "
          "tuple: the loss is lambda p, *example: loss(p[0], *example), and the parameters (params,)")


if TYPE_CHECKING:
    Base = Tensor  # as in `ops/weight.py`: to a type checker, a parameter is a tensor
else:
    Base = object


class TappedError(AttributeError, ValueError):
    """A loss uses a weight in a way in which the norm of its gradient cannot be measured."""


class Tapped(Base):
    """A weight that computes as usual. The squared norm of its gradient becomes the gradient of `tap`, a zero.

    It is a leaf, not a tree of tensors, so code that does not know it fails. Such code might change the weight before
    the model uses it, and the measured gradient would be that of another tensor. It may be used only once, since the
    norm of a sum of gradients does not follow from their norms. It may be used only at the level of transforms where it
    was made: inside a further `vmap` or `grad`, a single use can have such a sum as its gradient.
    """

    def __init__(self, weight: Tensor, tap: Tensor, path: str) -> None:
        self.shape, self.dtype, self.path = weight.shape, weight.dtype, path
        self._tensors, self._depth = (weight, tap), transforms()

    def linear(self, x: Tensor, inputs: int) -> Tensor:
        """The linear map W x."""
        plain, tap = self.use()
        return linear_observed(linear(plain, x, inputs), x.flatten(-inputs), tap, len(plain.shape) - inputs)

    def scale(self, x: Tensor) -> Tensor:
        """The product W * x, element by element."""
        plain, tap = self.use()
        return scale_observed(x * plain, x, tap)

    def look_up(self, numbers: Tensor) -> Tensor:
        """The rows of W with these numbers."""
        plain, tap = self.use()
        return embedding_observed(embed(plain, numbers), clamped(numbers, 0, len(plain))[0], tap, len(plain))

    def use(self) -> tuple[Tensor, Tensor]:
        """The weight and its tap. Raises `TappedError` at the second use, and inside any further transform."""
        if transforms() != self._depth:
            raise TappedError(f"the loss uses the weight {self.path} inside of a transform of its own (vmap, grad, "
                              f"jvp, remat), and the norm of its gradient is measured outside of them; {REMEDY}")
        if self._tensors is None:
            raise TappedError(f"the loss uses the weight {self.path} twice, and the norm of its gradient is measured "
                              f"in one place; {REMEDY}")
        (weight, tap), self._tensors = self._tensors, None
        if compiling():
            _keep_backward()
        return weight, tap

    def __getattr__(self, name: str) -> Any:
        raise TappedError(f"the loss uses the weight {self.path} as a tensor ({name}), and the norm of its gradient is "
                          f"measured only where the model uses it; {REMEDY}")

    def __mul__(self, other: Any) -> Any:
        return self.__getattr__("mul")

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, f: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return getattr(next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, cls)), f.__name__)


def linear_observed(y: Tensor, x: Tensor, tap: Tensor, axes: int) -> Tensor:
    """The output y of a linear map, unchanged; its backward adds the squared norm of dW to the gradient of the tap.

    The last `axes` axes of y are those of the outputs of W.
    """
    return _Observed.apply(y, x, tap, lambda x, g: linear_square(_rows(x), _rows(g.flatten(-axes))))


def embedding_observed(y: Tensor, tokens: Tensor, tap: Tensor, v: int) -> Tensor:
    """The same for y = W[tokens], with a vocabulary of v."""
    return _Observed.apply(y, tokens, tap, lambda tokens, g: embedding_square(tokens.flatten(), _rows(g), v))


def whole_observed(weight: Tensor, tap: Tensor) -> Tensor:
    """The weight itself, for any use: its backward adds the square of the weight's gradient to that of the tap."""
    return _Observed.apply(weight, weight, tap, lambda _, g: _upcast(g).square().sum())


def scale_observed(y: Tensor, x: Tensor, tap: Tensor) -> Tensor:
    """The same for y = W * x, with a vector W."""
    return _Observed.apply(y, x, tap, lambda x, g: (_rows(g) * _rows(x)).sum(0).square().sum())


@typed
def linear_square(x: Float[Tensor, "t d"], g: Float[Tensor, "t o"]) -> Float[Tensor, ""]:
    """The squared norm |g^T x|^2, from the smaller of the two: the matrices "t t", or the gradient itself."""
    if 2 * len(x) ** 2 <= x.shape[-1] * g.shape[-1]:
        return ((x @ x.mT) * (g @ g.mT)).sum()
    return (g.mT @ x).square().sum()


@typed
def embedding_square(tokens: Int[Tensor, "t"], g: Float[Tensor, "t d"], v: int) -> Float[Tensor, ""]:
    """The same for one-hot x: x x^T says which tokens are equal, and the cotangents of equal tokens are added."""
    if 2 * len(tokens) ** 2 <= v * g.shape[-1]:
        return ((g @ g.mT) * (tokens[:, None] == tokens)).sum()
    return g.new_zeros((v, g.shape[-1])).index_add(0, tokens, g).square().sum()


class _Observed(torch.autograd.Function):
    """The identity on y. Its backward passes the cotangent g on, and `square(x, g)` is the gradient of the tap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, tap: Tensor, square: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, x, _, ctx.square = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = cotangents
        return g, None, ctx.square(*ctx.saved_tensors, g), None


def _rows(x: Tensor) -> Tensor:
    return _upcast(x.flatten(0, -2))


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@known_while_tracing
def _keep_backward() -> None:
    """Have dynamo put these functions into its graph without tracing them.

    When dynamo traces an `autograd.Function` under `torch.func`, it drops the backward without a word (torch 2.13).
    """
    for f in (linear_observed, embedding_observed, scale_observed, whole_observed):
        torch.compiler.allow_in_graph(f)
