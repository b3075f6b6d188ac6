"""Decoding: prompts of any lengths are prefilled as one batch, then every step draws a token for each row."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn import random, tree
from llama_fn.compiled.decoding import decoder
from llama_fn.generation.sampling import DAMAGED, Sampler, Sampling, drawable
from llama_fn.model.block import block
from llama_fn.model.cache import Cache, NoCache, init_cache
from llama_fn.model.fork import select as select_rows
from llama_fn.model.transformer import Params, forward, head, trunk
from llama_fn.model.transformer import head as plain_head
from llama_fn.ops.inside import check
from llama_fn.ops.room import slots_for
from llama_fn.shapes import typed
from llama_fn.transforms import lora
from llama_fn.transforms.lora import Lora

CHUNK = 512  # the most prompt tokens that go through the model at once: attention's mask "t s" is held in memory


class State(NamedTuple):
    """Rows in the middle of decoding.

    Their cache, the logits of the next token, the tokens so far (-1 for none), and a stack of adapters, one a row, if
    the rows have adapters of their own.
    """

    cache: Cache
    logits: Float[Tensor, "b v"]
    tokens: Int[Tensor, "b s"]
    adapters: Lora | None = None


@typed
def prefill(params: Params, prompts: Sequence[Sequence[int]], max_len: int, adapters: Lora | None = None,
            run: Callable = forward) -> tuple[State, Float[Tensor, "b t v"]]:
    """The state after `prompts`, and the logits after every prompt token.

    The state has room for rows of `max_len` tokens and a few more. Shorter prompts are padded on the right. The slots
    beyond a row's length are never read, and the row's next tokens overwrite them, so each row decodes as if it were
    alone. `adapters` is a stack of adapters, one a row, or None; `run` is `forward`, or has its signature. Raises
    `ValueError` for an empty prompt, for one that does not fit, and if there are not as many adapters as prompts.
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
    tokens = F.pad(padded, (0, slots - padded.shape[1])).where(there, -1)
    last = logits[torch.arange(len(prompts), device=device), length - 1]
    return State(cache._replace(length=length), last, tokens, adapters), logits


def resume(params: Params, tokens: Sequence[int], cache: Cache | NoCache | None, max_len: int,
           layer: Callable = block, head: Callable = head) -> State:
    """The state of one row after `tokens`, whose first `cache.length` tokens are in the cache already.

    The other tokens go through the model. The last one always does, since its logits are needed. The cache grows to
    `max_len` slots and a few more if it has fewer. (Its axis s has two sizes here, so this function is not `typed`.)
    """
    check("token", min(tokens), max(tokens), 0, params.config.vocab_size)
    device, dtype, slots = params.embedding.device, params.embedding.dtype, slots_for(max_len)
    if not isinstance(cache, Cache):
        cache = init_cache(params.config, (1,), max_len=slots, dtype=dtype, device=device)
    known = min(int(cache.length), len(tokens) - 1)
    slots = max(slots, cache.k[0].shape[-2])
    longer: Cache = tree.map(lambda x: x if x.ndim == 1 else F.pad(x, (0, 0, 0, slots - x.shape[-2])),
                             cache._replace(length=torch.full_like(cache.length, known)))
    row = torch.tensor([list(tokens)], device=device)
    *chunks, last = row[:, known:].split(CHUNK, 1)
    for chunk in chunks:
        _, longer = trunk(params, chunk, longer, layer=layer)
    x, longer = trunk(params, last, longer, layer=layer)
    logits = head(params.norm, params.output, x[:, -1:], params.config.norm_eps)  # of the last alone: 6 % less work
    return State(longer, logits[:, -1], F.pad(row, (0, slots - len(tokens)), value=-1))


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


@typed
def advance(params: Params, state: State, token: Int[Tensor, "b"], run: Callable = forward) -> State:
    """The state after one more token a row; `run` is `forward`, or has its signature."""
    logits, cache, tokens = _advanced(params, state.adapters, state.cache, state.tokens, token, run)
    return State(cache, logits, tokens, state.adapters)


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
    logits, cache, tokens = _advanced(params, None, cache, tokens, token, functools.partial(forward, **parts))
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
