"""A weight in whose place the squared norm of its gradient is measured, and the gradient itself is never made.

The gradient of a linear map's weight is g^T x, of what came in, x "t d", and the cotangents of what went out, g "t o".
Its squared norm is the sum over all pairs of tokens of (x x^T)(g g^T), two matrices "t t" (Goodfellow 2015, "Efficient
per-example gradient computations"; Li et al. 2022, "Large language models can be strong differentially private
learners", section 4).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn.model.linear import linear
from llama_fn.model.transformer import embed
from llama_fn.modes import compiling, transforms
from llama_fn.ops.inside import held
from llama_fn.private import known_while_tracing
from llama_fn.shapes import typed

REMEDY = ("for such a loss, have whole gradients measured, one weight at a time, by wrapping the parameters in a "
          "tuple: the loss is lambda p, *example: loss(p[0], *example), and the parameters (params,)")


if TYPE_CHECKING:
    Base = Tensor  # in whose place it stands: `params.norm + 1` is right, which for nearly all parameters it is
else:
    Base = object


class TappedError(AttributeError, ValueError):
    """A weight is used in a way in which the norm of its gradient cannot be measured."""


class Tapped(Base):
    """In a weight's place: everything is computed as ever, and the gradient of `tap`, a zero, is the squared norm.

    A leaf, and no tree of tensors: what does not know it fails on it, where a weight that is changed on its way would
    have another gradient than the one measured. It may be used once: the norm of a sum does not follow from the norms.
    What a `vmap` or `grad` inside of the loss makes of its use is such a sum: it may be used only where it was made.
    """

    def __init__(self, weight: Tensor, tap: Tensor, path: str) -> None:
        self.shape, self.dtype, self.path = weight.shape, weight.dtype, path
        self._tensors, self._depth = (weight, tap), transforms()

    def linear(self, x: Tensor, inputs: int) -> Tensor:
        """W x."""
        plain, tap = self.use()
        return linear_observed(linear(plain, x, inputs), x.flatten(-inputs), tap, len(plain.shape) - inputs)

    def scale(self, x: Tensor) -> Tensor:
        """W * x."""
        plain, tap = self.use()
        return scale_observed(x * plain, x, tap)

    def look_up(self, numbers: Tensor) -> Tensor:
        """The rows of W with these numbers."""
        plain, tap = self.use()
        return embedding_observed(embed(plain, numbers), held(numbers, 0, len(plain))[0], tap, len(plain))

    def use(self) -> tuple[Tensor, Tensor]:
        """The weight and its tap. Raises `TappedError` the second time, and inside of any further transform."""
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
    """y = W x, unchanged, where the last `axes` axes of y are those of W: backwards, the tap gets |dW|^2."""
    return _Observed.apply(y, x, tap, lambda x, g: linear_square(_rows(x), _rows(g.flatten(-axes))))


def embedding_observed(y: Tensor, tokens: Tensor, tap: Tensor, v: int) -> Tensor:
    """The same for y = W[tokens], of a vocabulary of v."""
    return _Observed.apply(y, tokens, tap, lambda tokens, g: embedding_square(tokens.flatten(), _rows(g), v))


def whole_observed(weight: Tensor, tap: Tensor) -> Tensor:
    """The weight as it is; backwards, its gradient is made, and the tap gets the square, whatever it was used for."""
    return _Observed.apply(weight, weight, tap, lambda _, g: _exact(g).square().sum())


def scale_observed(y: Tensor, x: Tensor, tap: Tensor) -> Tensor:
    """The same for y = W * x, of a vector W."""
    return _Observed.apply(y, x, tap, lambda x, g: (_rows(g) * _rows(x)).sum(0).square().sum())


@typed
def linear_square(x: Float[Tensor, "t d"], g: Float[Tensor, "t o"]) -> Float[Tensor, ""]:
    """|g^T x|^2, by whichever is smaller: two matrices of pairs of tokens, or the gradient."""
    if 2 * len(x) ** 2 <= x.shape[-1] * g.shape[-1]:
        return ((x @ x.mT) * (g @ g.mT)).sum()
    return (g.mT @ x).square().sum()


@typed
def embedding_square(tokens: Int[Tensor, "t"], g: Float[Tensor, "t d"], v: int) -> Float[Tensor, ""]:
    """The same for one-hot x, where x x^T says which tokens are equal: their cotangents add up."""
    if 2 * len(tokens) ** 2 <= v * g.shape[-1]:
        return ((g @ g.mT) * (tokens[:, None] == tokens)).sum()
    return g.new_zeros((v, g.shape[-1])).index_add(0, tokens, g).square().sum()


class _Observed(torch.autograd.Function):
    """y as it came; backwards its cotangents go on, and `square` of x and of them goes to the tap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, tap: Tensor, square: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, x, _, ctx.square = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None, ctx.square(*ctx.saved_tensors, g), None


def _rows(x: Tensor) -> Tensor:
    return _exact(x.flatten(0, -2))


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@known_while_tracing
def _keep_backward() -> None:
    """Dynamo traces the forward of an `autograd.Function` under `torch.func` and leaves out its backward, in silence
    (2.13); what is allowed in the graph it hands on as it is."""
    for f in (linear_observed, embedding_observed, scale_observed, whole_observed):
        torch.compiler.allow_in_graph(f)


