"""Decoding: prompts of any lengths go in at once, then a token a row comes out of every step."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn import random, tree
from llama_fn.compiled.compiler import obstacle
from llama_fn.compiled.inductor import MANY_ROUNDS
from llama_fn.compiled.layers import by_shape, jit_layers
from llama_fn.generation.sampling import DAMAGED, Sampler, drawable, is_pure
from llama_fn.model.block import block
from llama_fn.model.cache import Cache, NoCache, init_cache
from llama_fn.model.fork import select as select_rows
from llama_fn.model.transformer import Params, forward, head, trunk
from llama_fn.model.transformer import head as plain_head
from llama_fn.ops.aten.inductor_sums import FEW
from llama_fn.ops.cpu import build as avx2
from llama_fn.ops.inside import check
from llama_fn.ops.room import slots_for
from llama_fn.private import lacking
from llama_fn.shapes import typed
from llama_fn.transforms import lora
from llama_fn.transforms.lora import Lora

CHUNK = 512  # tokens of a prompt that go through the model at once: what a token may see is a mask "t s" in memory
LARGE = 2**28  # bytes of weights: a step that reads so many takes longer than what compiling saves, after some tokens


class State(NamedTuple):
    """Rows in the middle of decoding: their cache, the logits of the next token, the tokens so far (-1 for none), and
    a stack of adapters, one a row, if they have their own.
    """

    cache: Cache
    logits: Float[Tensor, "b v"]
    tokens: Int[Tensor, "b s"]
    adapters: Lora | None = None


@typed
def prefill(params: Params, prompts: Sequence[Sequence[int]], max_len: int, adapters: Lora | None = None,
            run: Callable = forward) -> tuple[State, Float[Tensor, "b t v"]]:
    """The state after `prompts`, with room for rows of `max_len` tokens and a few more; and the logits after every
    prompt token.

    Shorter prompts are filled up on the right. What a cache holds beyond a row's length is never read, and is written
    over by the row's next tokens: a row is what it would be alone. `adapters` is a stack of one a row, or None; `run`
    is `forward` or its like. Raises `ValueError` for an empty prompt, for one that does not fit, and for another number
    of adapters than of prompts.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ValueError(f"prompt {lengths.index(0)} is empty: a model needs a token to go on from; "
                         "begin with the tokenizer's bos_id")
    if max(lengths) > max_len:
        raise ValueError(f"prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, the cache room for "
                         f"{max_len}; shorten it")
    if adapters is not None and (counts := {len(x) for x in tree.leaves(adapters)}) != {len(prompts)}:
        raise ValueError(f"adapters should be a stack of {len(prompts)}, one a prompt; the first axes of what came are "
                         f"{', '.join(map(str, sorted(counts)))}")
    for prompt in prompts:  # a tensor holds no integer of more than 64 bits
        check("token", min(prompt), max(prompt), 0, params.config.vocab_size)
    device, slots = params.embedding.device, slots_for(max_len)
    padded = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts], device=device)
    cache = init_cache(params.config, (len(prompts),), max_len=slots, dtype=params.embedding.dtype, device=device)
    pieces = []
    for chunk in padded.split(CHUNK, 1):
        piece, cache = _forward(params, adapters, chunk, cache, run)
        pieces.append(piece)
    logits = torch.cat(pieces, 1)

    length = torch.tensor(lengths, device=device)
    there = torch.arange(slots, device=device) < length[:, None]
    tokens = torch.nn.functional.pad(padded, (0, slots - padded.shape[1])).where(there, -1)
    last = logits[torch.arange(len(prompts), device=device), length - 1]
    return State(cache._replace(length=length), last, tokens, adapters), logits


def resume(params: Params, tokens: Sequence[int], cache: Cache | NoCache | None, max_len: int,
           layer: Callable = block, head: Callable = head) -> State:
    """The state of one row after `tokens`, of which the cache holds the first `length` already; the rest goes through
    the model, and at least the last. The cache grows to `max_len` slots and a few more if it has fewer (so its axis s
    has two sizes here, and this function is not `typed`).
    """
    check("token", min(tokens), max(tokens), 0, params.config.vocab_size)
    device, dtype, slots = params.embedding.device, params.embedding.dtype, slots_for(max_len)
    if not cache:
        cache = init_cache(params.config, (1,), max_len=slots, dtype=dtype, device=device)
    known = min(int(cache.length), len(tokens) - 1)
    slots = max(slots, cache.k[0].shape[-2])
    cache = tree.map(lambda x: x if x.ndim == 1 else torch.nn.functional.pad(x, (0, 0, 0, slots - x.shape[-2])),
                     cache._replace(length=torch.full_like(cache.length, known)))
    row = torch.tensor([list(tokens)], device=device)
    for chunk in row[:, known:].split(CHUNK, 1):
        x, cache = trunk(params, chunk, cache, layer=layer)
    logits = head(params.norm, params.output, x[:, -1:], params.config.norm_eps)  # of the last alone: 6 % less work
    return State(cache, logits[:, -1], torch.nn.functional.pad(row, (0, slots - len(tokens)), value=-1))


def drawn(logits: Tensor, lengths: Tensor, tokens: Tensor, keys: Tensor, sample: Sampler) -> Tensor:
    """The next token of every row, -1 where its logits are not `drawable`. At position i it is drawn with the row's key
    folded in with i: the draw depends on the row alone, whatever the batch and however the row came to its length.
    """
    def one(key: Tensor, position: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        return sample(random.fold_in(key, position), logits, tokens)

    # A sampler cannot look at its logits while it is mapped over rows.
    return torch.vmap(one)(keys, lengths, logits, tokens).where(drawable(logits), -1)


@typed
def draw(state: State, keys: Int[Tensor, "b 2"], sample: Sampler) -> Int[Tensor, "b"]:
    """`drawn` from the logits of a state."""
    return drawn(state.logits, state.cache.length, state.tokens, keys, sample)


@typed
def advance(params: Params, state: State, token: Int[Tensor, "b"], run: Callable = forward) -> State:
    """The state after one more token a row, which `run`, that is `forward` or its like, takes through the model."""
    logits, cache, tokens = _advanced(params, state.adapters, state.cache, state.tokens, token, run)
    return State(cache, logits, tokens, state.adapters)


def step(params: Params, state: State, token: Tensor, keys: Tensor, sample: Sampler,
         run: Callable = forward) -> tuple[State, Tensor]:
    """`advance` by the token, and `draw` the next."""
    state = advance(params, state, token, run)
    return state, draw(state, keys, sample)


def fast(params: Params, rows: int, sample: Sampler, layer: Callable = block, head: Callable = head) -> Callable:
    """`step` for a few rows after their prompts: compiled by its layers for weights of `LARGE` bytes and more, and as
    it is for all else. Its state's cache is donated: the old one, of a smaller length, stays what it was until somebody
    else goes on from it.

    Of the samplers, those of `sampler` are compiled; another may look at what changes from draw to draw. So may a layer
    or a head of one's own, and they run as they are.
    """
    if layer is not block or head is not plain_head:
        return functools.partial(step, run=functools.partial(forward, layer=layer, head=head))
    large = sum(x.nbytes for x in tree.leaves(params)) >= LARGE
    if not large or (rows > max(FEW, avx2.most(params.output)) and not params.norm.is_cuda):
        return step
    return _compiled(is_pure(sample))


@functools.cache  # compiled once in a process
def _compiled(pure: bool) -> Callable:
    if not pure or obstacle() or lacking():
        return functools.partial(step, run=jit_layers())
    own = by_shape(drawn, dynamic={"tokens": -1}, cpu=MANY_ROUNDS)

    def forward_and_draw(params: Params, cache: Cache, tokens: Tensor, token: Tensor, keys: Tensor, sample: Sampler,
                         **parts: Callable) -> tuple[Tensor, Cache, Tensor, Tensor]:
        run = functools.partial(forward, **parts)
        logits, cache, tokens = _advanced(params, None, cache, tokens, token, run)
        return logits, cache, tokens, own(logits, cache.length, tokens, keys, sample)

    run = jit_layers(forward_and_draw)

    def called(params: Params, state: State, token: Tensor, keys: Tensor, sample: Sampler) -> tuple[State, Tensor]:
        if state.adapters is not None:
            return step(params, state, token, keys, sample)
        logits, cache, tokens, token = run(params, state.cache, state.tokens, token, keys, sample)
        return State(cache, logits, tokens), token

    return called


class Step(NamedTuple):
    """A token that was drawn, its row, the logits it was drawn from, and the state, which it is not yet part of."""

    row: int
    token: int
    logits: Float[Tensor, "v"]
    state: State


def steps(params: Params, state: State, keys: Int[Tensor, "b 2"], sample: Sampler, ends: Collection[int],
          limits: Sequence[int], stopped: Callable[[int, int], bool] = lambda row, token: False,
          run: Callable = step) -> Iterator[Step]:
    """All tokens of all rows, as they are drawn; a token goes through the model when the one after it is asked for.

    A row ends before a token of `ends`, after as many tokens as its limit says, or with a token at which it is
    `stopped(row, token)`, which is asked once for each; it then leaves the batch. What is compiled for a number of rows
    goes on with a power of two: the first of those that stay fills up for those that left. Raises `ValueError` for
    logits that are not `drawable`.
    """
    left = list(limits)
    going, stay = list(range(len(limits))), [row for row, limit in enumerate(limits) if limit > 0]
    keys = keys.contiguous()  # one key for all rows has other strides than the keys of those that stay
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


def select(state: State, rows: list[int]) -> State:
    """The state of some of the rows, in the order given; the same row twice is a fork."""
    rest = tree.map(lambda x: x[rows], state._replace(cache=None))
    return rest._replace(cache=select_rows(state.cache, rows))


def _advanced(params: Params, adapters: Lora | None, cache: Cache, tokens: Tensor, token: Tensor,
              run: Callable) -> tuple[Tensor, Cache, Tensor]:
    tokens = tokens.index_put((torch.arange(len(token), device=token.device), cache.length), token)
    logits, cache = _forward(params, adapters, token[:, None], cache, run)
    return logits[:, 0], cache, tokens


def _forward(params: Params, adapters: Lora | None, tokens: Tensor, cache: Cache,
             run: Callable = forward) -> tuple[Tensor, Cache]:
    if adapters is None:
        return run(params, tokens, cache)
    return torch.vmap(lambda adapter, *row: run(lora.apply(params, adapter), *row))(adapters, tokens, cache)
