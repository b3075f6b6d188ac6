"""The compiled decode step that generation uses, and the models for which compiling pays."""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

from llama_fn import tree
from llama_fn.compiled.compiler import uncompiled
from llama_fn.compiled.inductor import MANY_ROUNDS
from llama_fn.compiled.layers import by_layers, by_shape, obstacle
from llama_fn.model.transformer import Params, forward
from llama_fn.modes import on_gpu
from llama_fn.ops.aten.few_rows import FEW
from llama_fn.ops.cpu.linear import max_rows

LARGE = 2**28  # bytes of weights; a step that reads fewer is so short that compiling costs more time than it saves


class Compiled(NamedTuple):
    """A decode step in two compiled forms."""

    forward: Callable  # the model alone: takes the place of `forward`
    step: Callable | None  # the model and the draw together; None where nothing can be compiled


def decoder(step: Callable, draw: Callable) -> Callable[[Params, int], Compiled | None]:
    """A function `compiled(params, rows)` to the compiled forms of `step`, or to None where compiling does not pay.

    `step(params, cache, tokens, *rest, draw=, layer=, head=, trunk=)` runs the model and then `draw`, whose second
    argument but one is `tokens`, of any length. What is compiled belongs to the function that comes back: its callers
    share it. Nothing is made before the first call that it pays for. The cache is donated.
    """
    made: list[Compiled] = []

    def compiled(params: Params, rows: int) -> Compiled | None:
        if not pays(params, rows):
            return None
        if not made:
            made.append(_compiled_step(step, draw))
        return made[0]

    return compiled


def pays(params: Params, rows: int) -> bool:
    """Whether a compiled decode step of so many rows gains more time than compiling takes.

    On a CPU, the compiled kernels are faster than torch's for few rows alone.
    """
    large, output = sum(x.nbytes for x in tree.leaves(params)) >= LARGE, params.output
    own = getattr(output, "local", output)  # of a weight that is divided over devices, this one's part
    return large and (on_gpu(tree.leaves(params.norm)[0]) or rows <= max(FEW, max_rows(own)))


def _compiled_step(step: Callable, draw: Callable) -> Compiled:
    if (reason := obstacle()) is not None:
        warnings.warn(uncompiled("a decode step", reason), stacklevel=4)
        return Compiled(forward, None)
    compiled_draw = by_shape(draw, dynamic={"tokens": -1}, cpu=MANY_ROUNDS)
    return Compiled(by_layers(forward), by_layers(functools.partial(step, draw=compiled_draw)))
