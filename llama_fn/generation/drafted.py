"""Completing text with a draft model beside: the text of `text_completion`, only sooner."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation.completion import keys_of, room
from llama_fn.generation.sampling import Narrowing, narrowing
from llama_fn.generation.speculative import Round, rounds
from llama_fn.generation.stop_strings import check_stop, stops, until
from llama_fn.ranges import integer


class Speculation(NamedTuple):
    """What the model wrote: text and tokens (no end token); and of how many `proposed` tokens it `accepted` how many.

    The counts are those of whole rounds, with what was proposed beyond the text's end.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    proposed: int = 0
    accepted: int = 0


def speculate(model: Model, draft: Model, prompts: Sequence[str], *, key: Int[Tensor, "2"] | Int[Tensor, "n 2"],
              n: int = 4, max_new_tokens: int | None = None, narrow: Narrowing | None = None,
              stop: Sequence[str] = ()) -> list[Speculation]:
    """Complete every prompt as `text_completion` does, with a `draft` model that proposes `n` tokens a round.

    The text is that of `text_completion(..., sampler=sampler(...))` for the same key, token by token (up to rounding),
    with `narrow` from `narrowing` of the same settings, whatever the draft; only the speed depends on it. Keys, rows,
    ends and limits are the same.

    Raises `ValueError` as `text_completion` does, for a draft with another vocabulary, and for `n` below 1. (Two models
    have axes of different sizes, so this function is not `typed`; what it calls is.)
    """
    if isinstance(prompts, str):
        raise ValueError("speculate: prompts is one text; put it in a list")

    told = [Speculation() for _ in prompts]
    stopped = stops(model.tokenizer, prompts, stop)
    for round in _begun(model, draft, prompts, key, n, max_new_tokens, narrow, stop, stopped):
        told[round.row] = _after(told[round.row], round)
    return [x._replace(text="".join(until(model.tokenizer.decode_stream(x.tokens, prompt != ""), stop)))
            for x, prompt in zip(told, prompts, strict=True)]


def speculate_stream(model: Model, draft: Model, prompt: str, *, key: Int[Tensor, "2"], n: int = 4,
                     max_new_tokens: int | None = None, narrow: Narrowing | None = None,
                     stop: Sequence[str] = ()) -> Iterator[tuple[str, Speculation]]:
    """`speculate` for one prompt: pieces of text as they come, each with all that was told so far; the last is "".

    Raises `ValueError` as `speculate` does, at once.
    """
    told = Speculation()
    rounds = _begun(model, draft, [prompt], key, n, max_new_tokens, narrow, stop)

    def ids() -> Iterator[int]:
        nonlocal told
        for round in rounds:
            told = _after(told, round)
            yield from round.tokens

    def pieces() -> Iterator[tuple[str, Speculation]]:
        nonlocal told
        for piece in until(model.tokenizer.decode_stream(ids(), prompt != ""), stop):
            told = told._replace(text=told.text + piece)
            yield piece, told
        yield "", told

    return pieces()


def _begun(model: Model, draft: Model, prompts: Sequence[str], key: Tensor, n: int, max_new_tokens: int | None,
           narrow: Narrowing | None, stop: Sequence[str],
           stopped: Callable[[int, int], bool] = lambda row, token: False) -> Iterator[Round]:
    check_stop(stop)
    check_tokenizer(model)
    check_tokenizer(draft)
    if (n := integer("n", n)) < 1:
        raise ValueError(f"n must be at least 1 proposed token a round, got {n}")
    _check_vocabulary(model, draft)
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    limits = [room(model.params, len(ids), max_new_tokens) for ids in encoded]
    keys = keys_of(key, len(encoded), model.params)
    return rounds(model.params, draft.params, encoded, keys, narrow or narrowing(), n, model.tokenizer.ends, limits,
                  stopped)


def _after(told: Speculation, round: Round) -> Speculation:
    return Speculation(told.text, (*told.tokens, *round.tokens), told.proposed + round.proposed,
                       told.accepted + round.accepted)


def _check_vocabulary(model: Model, draft: Model) -> None:
    sizes = [x.params.config.vocab_size for x in (draft, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the draft has a vocabulary of {sizes[0]} tokens, the model of {sizes[1]}; "
                         "a draft needs the model's own tokenizer")
    if any(getattr(draft.tokenizer, name) != getattr(model.tokenizer, name) for name in ("model", "names")):
        raise ValueError("the draft has another tokenizer than the model, so their tokens mean different words; "
                         "a draft needs the model's own")
