"""Speculative decoding: a small draft model proposes tokens, and the target model checks them all in one pass.

Leviathan et al. 2023, "Fast inference from transformers via speculative decoding"; Chen et al. 2023. Both models sample
with the same Gumbel noise, and a proposal is accepted if the target model itself draws the same token (Daliri, Musco
and Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding"). So the text depends on
the target model and the key, and the draft model only changes the speed. To take rejected proposals back, the
``length`` of both caches is reduced.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn import random, tree
from llama_fn.generation.sampling import Narrowing, check_drawable
from llama_fn.generation.state import prefill
from llama_fn.model.cache import Cache
from llama_fn.model.transformer import Params, forward
from llama_fn.shapes import typed


class State(NamedTuple):
    """Rows in the middle of speculation: a cache for each model, and the tokens so far (-1 where there is none).

    The target's cache holds all tokens but the last. The draft's cache holds all but the last two, because the draft
    model has not seen its own last proposal when all proposals are accepted.
    """

    target: Cache
    draft: Cache
    tokens: Int[Tensor, "b s"]


class Round(NamedTuple):
    """The new tokens of one row after a round, and how many tokens were proposed and accepted."""

    row: int
    tokens: list[int]
    proposed: int
    accepted: int


def rounds(target: Params, draft: Params, prompts: Sequence[list[int]], keys: Int[Tensor, "b 2"], narrow: Narrowing,
           n: int, end_ids: Collection[int], limits: Sequence[int],
           stopped: Callable[[int, int], bool] = lambda row, token: False) -> Iterator[Round]:
    """All tokens of all rows. In each round the target model reads n + 1 tokens of each row in one pass.

    Rows end as in `decode.steps` and then leave the batch. The first round is one token for each row, drawn from the
    target's logits after the prompt. The caches have n slots more than the longest row, for proposals after its end.
    """
    written: list[list[int]] = [[] for _ in limits]
    going = [row for row, limit in enumerate(limits) if limit > 0]
    if not going:
        return
    keys, longest = keys[going], max(len(prompts[row]) + limits[row] for row in going)
    state = begin(target, draft, [prompts[row] for row in going], keys, narrow, longest + n)
    accepted, proposed = torch.zeros_like(state.target.length), 0
    while True:
        stay, counts, ends, tokens = [], *(x.tolist() for x in (accepted, state.target.length + 1, state.tokens))
        for place, row in enumerate(going):
            before, ended = len(written[row]), False
            for id in tokens[place][ends[place] - counts[place] - 1:ends[place]]:
                if not (ended := id in end_ids):
                    written[row].append(id)
                    ended = len(written[row]) == limits[row] or stopped(row, id)
                if ended:
                    break
            yield Round(row, written[row][before:], proposed, counts[place])
            if not ended:
                stay.append(place)
        if not stay:
            return
        if len(stay) < len(going):
            going, keys = [going[place] for place in stay], keys[stay]
            state = tree.map(lambda x: x[stay], state)  # noqa: B023, called at once
        (state, accepted), proposed = advance(target, draft, state, keys, narrow, n), n


def begin(target: Params, draft: Params, prompts: Sequence[list[int]], keys: Int[Tensor, "b 2"], narrow: Narrowing,
          max_len: int) -> State:
    """The state after the prompts and one token for each row."""
    state, _ = prefill(target, prompts, max_len)
    drafting, _ = prefill(draft, prompts, max_len)
    check_drawable(state.logits, "the")
    length, logits = state.cache.length, narrow(state.logits, state.tokens)
    token = _draw(logits, noise(keys, length, 1, logits.shape[-1], logits.dtype)[:, 0])
    return State(state.cache, drafting.cache._replace(length=length - 1), _put(state.tokens, length, token))


def advance(target: Params, draft: Params, state: State, keys: Int[Tensor, "b 2"], narrow: Narrowing,
            n: int) -> tuple[State, Int[Tensor, "b"]]:
    """The state after one round, and how many of the n proposals were accepted in each row.

    A row grows by its accepted proposals and one more token, which the target model drew after them. (An axis has
    different sizes in the two models, so this function is not `typed`. The functions that it calls are.)
    """
    length, dtype = state.target.length + 1, torch.promote_types(target.embedding.dtype, torch.float32)
    gumbel = noise(keys, length, n + 1, target.config.vocab_size, dtype)
    drafted, tokens = propose(draft, state.draft, state.tokens, gumbel, narrow, n)
    checked, own = check(target, state.target, tokens, gumbel, narrow)
    accepted = (own[:, :n] == _take(tokens, length, 0, n)).long().cumprod(1).sum(1)
    slots, ahead = (torch.arange(size, device=tokens.device) for size in (tokens.shape[1], n + 1))
    tokens, length = tokens.scatter(1, length[:, None] + ahead, own), length + accepted + 1
    return State(checked._replace(length=length - 1), drafted._replace(length=length - 2),
                 tokens.where(slots < length[:, None], -1)), accepted


@typed
def propose(draft: Params, cache: Cache, tokens: Int[Tensor, "b s"], gumbel: Float[Tensor, "b t v"], narrow: Narrowing,
            n: int) -> tuple[Cache, Int[Tensor, "b s"]]:
    """The draft model's cache, and the tokens with n proposals after them."""
    length = cache.length + 2
    new = _take(tokens, length, -2, 0)
    for i in range(n):
        logits, cache = forward(draft, new, cache)
        check_drawable(logits[:, -1], "the draft's")
        new = _draw(narrow(logits[:, -1], tokens), gumbel[:, i])[:, None]
        tokens = _put(tokens, length + i, new[:, 0])
    return cache, tokens


@typed
def check(target: Params, cache: Cache, tokens: Int[Tensor, "b s"], gumbel: Float[Tensor, "b t v"],
          narrow: Narrowing) -> tuple[Cache, Int[Tensor, "b t"]]:
    """The target model's cache, and the token that it draws at the place of each proposal and after the last one."""
    t = gumbel.shape[1]
    logits, after = forward(target, _take(tokens, cache.length + 1, -1, t - 1), cache)
    check_drawable(logits, "the")
    slots, ahead = (torch.arange(size, device=tokens.device) for size in (tokens.shape[1], t))
    before = slots <= (cache.length[:, None] + ahead)[..., None]
    return after, _draw(narrow(logits, tokens[:, None].where(before, -1)), gumbel)


@typed
def noise(keys: Int[Tensor, "b 2"], begin: Int[Tensor, "b"], count: int, size: int,
          dtype: torch.dtype) -> Float[Tensor, "b t o"]:
    """The Gumbel noise with which `decode.draw` samples at `count` positions, from `begin` on.

    The noise of all positions is computed at once, because Threefry takes 200 small operations for any number of them.
    """
    positions = begin[:, None] + torch.arange(count, device=begin.device)
    at_position = torch.vmap(lambda key, i: random.gumbel(random.fold_in(key, i), (size,), dtype))
    return at_position(keys.repeat_interleave(count, 0), positions.flatten()).unflatten(0, positions.shape)


def _draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Sample as `lf.random.categorical` does, with noise that is given."""
    return (logits + noise).argmax(-1)


def _take(tokens: Tensor, length: Tensor, begin: int, end: int) -> Tensor:
    """The tokens of each row from slot ``length + begin`` up to slot ``length + end``."""
    return tokens.gather(1, length[:, None] + torch.arange(begin, end, device=tokens.device))


def _put(tokens: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """The tokens with one new token in each row, at that row's slot."""
    return tokens.scatter(1, slots[:, None], new[:, None])
