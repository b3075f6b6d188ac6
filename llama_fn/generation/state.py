"""Rows in the middle of decoding: their state after a prompt, and after one more token."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama_fn import tree
from llama_fn.mesh.ranks import check_same
from llama_fn.model.block import block
from llama_fn.model.cache import Cache, NoCache, init_cache
from llama_fn.model.fork import select as select_rows
from llama_fn.model.transformer import Params, forward, head, trunk
from llama_fn.ops.inside import check
from llama_fn.ops.room import slots_for
from llama_fn.shapes import typed
from llama_fn.transforms import lora
from llama_fn.transforms.lora import Lora

CHUNK = 512  # prompt tokens that go through the model at once, since attention's mask "t s" is held in memory


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
    check_same("prompts and their limit", (list(map(list, prompts)), max_len), params)
    device, slots = params.embedding.device, slots_for(max_len)
    padded = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts], device=device)
    cache = init_cache(params.config, (len(prompts),), max_len=slots, dtype=params.embedding.dtype, device=device,
                       heads=params.blocks[0].attention.wk.shape[0])
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
    check_same("a prompt and its limit", (list(tokens), max_len), params)
    device, dtype, slots = params.embedding.device, params.embedding.dtype, slots_for(max_len)
    if not isinstance(cache, Cache):
        heads = params.blocks[0].attention.wk.shape[0]
        cache = init_cache(params.config, (1,), max_len=slots, dtype=dtype, device=device, heads=heads)
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


@typed
def advance(params: Params, state: State, token: Int[Tensor, "b"], run: Callable = forward) -> State:
    """The state after one more token a row; `run` is `forward`, or has its signature."""
    logits, cache, tokens = advanced(params, state.adapters, state.cache, state.tokens, token, run)
    return State(cache, logits, tokens, state.adapters)


def select(state: State, rows: list[int]) -> State:
    """The state of some of the rows, in the order given; the same row twice is a fork."""
    rest = tree.map(lambda x: x[rows], state._replace(cache=None))
    return rest._replace(cache=select_rows(state.cache, rows))


def advanced(params: Params, adapters: Lora | None, cache: Cache, tokens: Tensor, token: Tensor,
             run: Callable) -> tuple[Tensor, Cache, Tensor]:
    """`advance` on the parts of a state: the new logits, cache and tokens."""
    tokens = tokens.index_put((torch.arange(len(token), device=token.device), cache.length), token)
    logits, cache = _forward(params, adapters, token[:, None], cache, run)
    return logits[:, 0], cache, tokens


def _forward(params: Params, adapters: Lora | None, tokens: Tensor, cache: Cache,
             run: Callable = forward) -> tuple[Tensor, Cache]:
    if adapters is None:
        return run(params, tokens, cache)
    return torch.vmap(lambda adapter, *row: run(lora.apply(params, adapter), *row))(adapters, tokens, cache)
