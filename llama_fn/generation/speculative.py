"""Speculative decoding: a small model drafts, the large one checks it all in one pass, and the text is the large one's.

Leviathan et al. 2023, "Fast inference from transformers via speculative decoding"; Chen et al. 2023. Both models draw
by the same noise, and a proposal is accepted if it is what the large model draws itself (Daliri, Musco and Suresh 2024,
"Coupling without communication and drafter-invariant speculative decoding"): the key alone decides the text, and the
draft when it comes. What was drafted in vain is taken back by another `length` of the caches, and by nothing else.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn import random, tree
from llama_fn.generation import decode
from llama_fn.generation.sampling import Narrowing, check_drawable
from llama_fn.model.cache import Cache
from llama_fn.model.transformer import Params, forward
from llama_fn.shapes import typed


class State(NamedTuple):
    """Rows in the middle of speculation: their tokens so far (-1 for none), and two caches of the tokens before.

    The model's cache holds all tokens but the last, which it has still to see; the draft's all but the last two, as it
    has not seen the last of its proposals if all were accepted.
    """

    target: Cache
    draft: Cache
    tokens: Int[Tensor, "b s"]


class Round(NamedTuple):
    """What a round gave one row: its new tokens, and how many were proposed and accepted."""

    row: int
    tokens: list[int]
    proposed: int
    accepted: int


def rounds(target: Params, draft: Params, prompts: Sequence[list[int]], keys: Int[Tensor, "b 2"], narrow: Narrowing,
           n: int, end_ids: Collection[int], limits: Sequence[int],
           stopped: Callable[[int, int], bool] = lambda row, token: False) -> Iterator[Round]:
    """All tokens of all rows, by rounds of one pass of the target over n + 1 tokens a row.

    Rows end as those of `decode.steps` do, and then leave the batch. The first round is one token a row, which the
    target's logits after the prompt give. The caches have n slots more than the longest row, for proposals beyond it.
    """
    written: list[list[int]] = [[] for _ in limits]
    going = [row for row, limit in enumerate(limits) if limit > 0]
    if not going:
        return
    keys, longest = keys[going], max(len(prompts[row]) + limits[row] for row in going)
    state = begin(target, draft, [prompts[row] for row in going], keys, narrow, longest + n)
    taken, proposed = torch.zeros_like(state.target.length), 0
    while True:
        stay, counts, ends, tokens = [], *(x.tolist() for x in (taken, state.target.length + 1, state.tokens))
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
        (state, taken), proposed = advance(target, draft, state, keys, narrow, n), n


def begin(target: Params, draft: Params, prompts: Sequence[list[int]], keys: Int[Tensor, "b 2"], narrow: Narrowing,
          max_len: int) -> State:
    """The state after the prompts and one token a row."""
    state, _ = decode.prefill(target, prompts, max_len)
    other, _ = decode.prefill(draft, prompts, max_len)
    check_drawable(state.logits, "the")
    length, logits = state.cache.length, narrow(state.logits, state.tokens)
    token = _draw(logits, noise(keys, length, 1, logits.shape[-1], logits.dtype)[:, 0])
    return State(state.cache, other.cache._replace(length=length - 1), _put(state.tokens, length, token))


def advance(target: Params, draft: Params, state: State, keys: Int[Tensor, "b 2"], narrow: Narrowing,
            n: int) -> tuple[State, Int[Tensor, "b"]]:
    """The state after one round, and how many of n proposals each row took: it is one token longer than by those.

    (The caches of two models have axes of different sizes, so this function is not `typed`; its parts are.)
    """
    length, dtype = state.target.length + 1, torch.promote_types(target.embedding.dtype, torch.float32)
    chance = noise(keys, length, n + 1, target.config.vocab_size, dtype)
    drafted, tokens = propose(draft, state.draft, state.tokens, chance, narrow, n)
    checked, own = check(target, state.target, tokens, chance, narrow)
    taken = (own[:, :n] == _take(tokens, length, 0, n)).long().cumprod(1).sum(1)
    slots, ahead = (torch.arange(size, device=tokens.device) for size in (tokens.shape[1], n + 1))
    tokens, length = tokens.scatter(1, length[:, None] + ahead, own), length + taken + 1
    return State(checked._replace(length=length - 1), drafted._replace(length=length - 2),
                 tokens.where(slots < length[:, None], -1)), taken


@typed
def propose(draft: Params, cache: Cache, tokens: Int[Tensor, "b s"], chance: Float[Tensor, "b t v"], narrow: Narrowing,
            n: int) -> tuple[Cache, Int[Tensor, "b s"]]:
    """`tokens` with n more, drawn by the draft."""
    length = cache.length + 2
    new = _take(tokens, length, -2, 0)
    for i in range(n):
        logits, cache = forward(draft, new, cache)
        check_drawable(logits[:, -1], "the draft's")
        new = _draw(narrow(logits[:, -1], tokens), chance[:, i])[:, None]
        tokens = _put(tokens, length + i, new[:, 0])
    return cache, tokens


@typed
def check(target: Params, cache: Cache, tokens: Int[Tensor, "b s"], chance: Float[Tensor, "b t v"],
          narrow: Narrowing) -> tuple[Cache, Int[Tensor, "b t"]]:
    """What the target draws itself at each proposal's place, after the proposals before it, and after the last."""
    t = chance.shape[1]
    logits, after = forward(target, _take(tokens, cache.length + 1, -1, t - 1), cache)
    check_drawable(logits, "the")
    slots, ahead = (torch.arange(size, device=tokens.device) for size in (tokens.shape[1], t))
    before = slots <= (cache.length[:, None] + ahead)[..., None]
    return after, _draw(narrow(logits, tokens[:, None].where(before, -1)), chance)


@typed
def noise(keys: Int[Tensor, "b 2"], begin: Int[Tensor, "b"], count: int, size: int,
          dtype: torch.dtype) -> Float[Tensor, "b t o"]:
    """For the positions from `begin` on, the Gumbel noise that `decode.draw` draws by.

    All at once: Threefry is 200 small operations, whatever it draws.
    """
    positions = begin[:, None] + torch.arange(count, device=begin.device)
    one = torch.vmap(lambda key, i: random.gumbel(random.fold_in(key, i), (size,), dtype))
    return one(keys.repeat_interleave(count, 0), positions.flatten()).unflatten(0, positions.shape)


def _draw(logits: Tensor, noise: Tensor) -> Tensor:
    """`random.categorical`, by noise that is drawn already."""
    return (logits + noise).argmax(-1)


def _take(tokens: Tensor, length: Tensor, begin: int, end: int) -> Tensor:
    """Each row's tokens at the slots `length + begin` to `length + end`."""
    return tokens.gather(1, length[:, None] + torch.arange(begin, end, device=tokens.device))


def _put(tokens: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    return tokens.scatter(1, slots[:, None], new[:, None])
