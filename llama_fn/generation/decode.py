"""Decoding: every step draws a token for each row, and puts it through the model."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn import random
from llama_fn.compiled.decoding import decoder
from llama_fn.generation.sampling import DAMAGED, Sampler, Sampling, drawable
from llama_fn.generation.state import State, advance, advanced, select
from llama_fn.model.block import block
from llama_fn.model.cache import Cache
from llama_fn.model.transformer import Params, forward, head
from llama_fn.model.transformer import head as plain_head
from llama_fn.shapes import typed


def drawn(logits: Tensor, lengths: Tensor, tokens: Tensor, keys: Tensor, sample: Sampler) -> Tensor:
    """The next token of every row, -1 where its logits are not `drawable`.

    The key at position i is the row's key with i folded in. So a draw depends on the row alone, and neither on the
    batch nor on how the row came to its length.
    """
    def one(key: Tensor, position: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        return sample(random.fold_in(key, position), logits, tokens)

    # Under `vmap`, a sampler cannot branch on the values of its logits, so they are checked here.
    return torch.vmap(one)(keys, lengths, logits, tokens).where(drawable(logits), -1)


@typed
def draw(state: State, keys: Int[Tensor, "b 2"], sample: Sampler) -> Int[Tensor, "b"]:
    """`drawn` from the logits of a state."""
    return drawn(state.logits, state.cache.length, state.tokens, keys, sample)


def step(params: Params, state: State, token: Tensor, keys: Tensor, sample: Sampler,
         run: Callable = forward) -> tuple[State, Tensor]:
    """`advance` by the token, and `draw` the next."""
    state = advance(params, state, token, run)
    return state, draw(state, keys, sample)


def step_for(params: Params, rows: int, sample: Sampler, layer: Callable = block, head: Callable = head) -> Callable:
    """`step`, or its compiled form where that is faster for such parameters and this number of rows.

    A compiled step writes into the cache of its state. The old state stays valid, since its length is smaller. But if
    it is continued twice, the second time overwrites the slots of the first. A `Sampling` is compiled. Another sampler
    may depend on more than its arguments, so it runs as it is. So do a `layer` and a `head` of the caller's own.
    """
    if layer is not block or head is not plain_head:
        return functools.partial(step, run=functools.partial(forward, layer=layer, head=head))
    compiled = _compiled(params, rows)
    if compiled is None:
        return step
    if compiled.step is None or not isinstance(sample, Sampling):
        return functools.partial(step, run=compiled.forward)
    return functools.partial(_step_by, compiled.step)


def _step_by(compiled: Callable, params: Params, state: State, token: Tensor, keys: Tensor,
             sample: Sampler) -> tuple[State, Tensor]:
    if state.adapters is not None:
        return step(params, state, token, keys, sample)
    logits, cache, tokens, token = compiled(params, state.cache, state.tokens, token, keys, sample)
    return State(cache, logits, tokens), token


def _forward_and_draw(params: Params, cache: Cache, tokens: Tensor, token: Tensor, keys: Tensor, sample: Sampler, *,
                      draw: Callable, **parts: Callable) -> tuple[Tensor, Cache, Tensor, Tensor]:
    """`step` on the parts of a state, because a step recorded for a GPU takes the cache as a separate argument."""
    logits, cache, tokens = advanced(params, None, cache, tokens, token, functools.partial(forward, **parts))
    return logits, cache, tokens, draw(logits, cache.length, tokens, keys, sample)


_compiled = decoder(_forward_and_draw, drawn)  # it holds the compiled step, which all generation in a process shares


class Step(NamedTuple):
    """A token that was drawn, its row, the logits it was drawn from, and the state, which does not contain it yet."""

    row: int
    token: int
    logits: Float[Tensor, "v"]
    state: State


def steps(params: Params, state: State, keys: Int[Tensor, "b 2"], sample: Sampler, ends: Collection[int],
          limits: Sequence[int], stopped: Callable[[int, int], bool] = lambda row, token: False,
          run: Callable = step) -> Iterator[Step]:
    """All tokens of all rows, as they are drawn; a token goes through the model when the next is requested.

    A row ends before a token of `ends`, after as many tokens as its limit says, or after a token for which
    `stopped(row, token)` is true; it then leaves the batch. `stopped` is called at most once for each token. For a
    compiled step, copies of the first remaining row fill the batch up to a power of two, so that it is compiled for few
    sizes. Raises `ValueError` for logits that are not `drawable`.
    """
    left = list(limits)
    going, stay = list(range(len(limits))), [row for row, limit in enumerate(limits) if limit > 0]
    keys = keys.contiguous()  # one key expanded to all rows has other strides than the keys selected below
    token = None
    while stay:
        if len(stay) < len(going):
            rows = len(stay) if run is step else min(2 ** (len(stay) - 1).bit_length(), len(keys))
            places = stay + stay[:1] * (rows - len(stay))
            going, keys = [going[place] for place in stay], keys[places]
            state, token = select(state, places), None if token is None else token[places]
        if token is None:
            token = draw(state, keys, sample)
        else:
            state, token = run(params, state, token, keys, sample)
        ids, stay = token.tolist(), []
        if min(ids) < 0:
            raise ValueError(f"the {DAMAGED} (or a sampler of one's own drew a token below 0)")
        for place, (row, id) in enumerate(zip(going, ids, strict=False)):
            if id in ends:
                continue
            left[row] -= 1
            yield Step(row, id, state.logits[place], state)
            if left[row] and not stopped(row, id):
                stay.append(place)
