"""Generate tokens after tokens, without a tokenizer."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from llama_fn.generation.completion import complete
from llama_fn.generation.sampling import Sampler
from llama_fn.model.block import block
from llama_fn.model.transformer import Params
from llama_fn.model.transformer import head as plain_head
from llama_fn.shapes import typed
from llama_fn.transforms.lora import Lora


class Generation(NamedTuple):
    """What `generate` wrote after one row.

    ``tokens`` does not include a stop token. ``logprobs`` has the natural log-probability of each token, or is None if
    it was not asked for.

    >>> rows[0].tokens
    """

    tokens: list[int]
    logprobs: list[float] | None


@typed
def generate(params: Params, prompts: Int[Tensor, "b t"] | Sequence[Sequence[int] | Int[Tensor, "_"]], *,
             key: Int[Tensor, "2"] | Int[Tensor, "n 2"], max_new_tokens: int | None = None,
             sampler: Sampler | None = None, stop_ids: Collection[int] = (), logprobs: bool = False,
             adapters: Lora | None = None, layer: Callable[..., Any] = block,
             head: Callable[..., Any] = plain_head) -> list[Generation]:
    """Continue every row of tokens.

    A row ends before a token of `stop_ids`, after `max_new_tokens` tokens, or at the end of the context, whichever
    comes first. Rows may differ in length. Nothing is added to a row, so begin a text with the tokenizer's ``bos_id``.
    The arguments `key`, `sampler`, `logprobs`, `adapters`, `layer` and `head` mean the same as in `text_completion`,
    which encodes texts and then does the same.

    Raises `ValueError` for an empty row, for a row as long as the context, for a token outside the vocabulary, for a
    row that is not in a list, and for a number of keys that is neither one nor the number of rows.

    >>> rows = lf.generate(params, batch, key=key, max_new_tokens=8)
    """
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [
        row.tolist() if isinstance(row, Tensor) else list(row) for row in prompts]
    if not rows:
        return []
    written, nats, _ = complete(params, rows, key, max_new_tokens, sampler, logprobs, ends=stop_ids, adapters=adapters,
                                layer=layer, head=head)
    return [Generation(ids, row if logprobs else None) for ids, row in zip(written, nats, strict=True)]
