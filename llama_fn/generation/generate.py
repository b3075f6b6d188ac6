"""Generation from tokens to tokens, without a tokenizer."""

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
    """The tokens that follow a row (no stop token), and if asked for, the natural log-probability of each."""

    tokens: list[int]
    logprobs: list[float] | None


@typed
def generate(params: Params, prompts: Int[Tensor, "b t"] | Sequence[Sequence[int] | Int[Tensor, "_"]], *,
             key: Int[Tensor, "2"] | Int[Tensor, "n 2"], max_new_tokens: int | None = None,
             sampler: Sampler | None = None, stop_ids: Collection[int] = (), logprobs: bool = False,
             adapters: Lora | None = None, layer: Callable[..., Any] = block,
             head: Callable[..., Any] = plain_head) -> list[Generation]:
    """Continue every row of tokens, up to a token of `stop_ids` (not part of the result), `max_new_tokens`, or the end
    of the context, whichever comes first. Nothing is added to a row: begin a text with the tokenizer's `bos_id`.

    Rows may differ in length. Keys, log-probabilities and adapters are those of `text_completion`, which does the same
    with the tokens of texts; `layer` and `head` are those of `forward`.

    Raises `ValueError` for an empty row, for one as long as the context, for a token outside the vocabulary, for one
    row that is not in a list, and for as many keys as there are neither one nor rows.
    """
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [
        row.tolist() if isinstance(row, Tensor) else list(row) for row in prompts]
    if not rows:
        return []
    written, nats, _ = complete(params, rows, key, max_new_tokens, sampler, logprobs, ends=stop_ids, adapters=adapters,
                                layer=layer, head=head)
    return [Generation(ids, row if logprobs else None) for ids, row in zip(written, nats, strict=True)]
