"""Complete texts with the help of a draft model: the text of `text_completion`, but sooner."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation.completion import keys_of, token_limit
from llama_fn.generation.sampling import Narrowing, narrowing
from llama_fn.generation.speculative import Round, rounds
from llama_fn.generation.stop_strings import check_stop, stops, until
from llama_fn.ranges import integer


class Speculation(NamedTuple):
    """What the model wrote after one prompt with the help of a draft model.

    ``tokens`` does not include the end token. The draft model proposed ``proposed`` tokens, of which ``accepted`` were
    right. Both counts include what was proposed after the end of the text.

    >>> drafted[0].accepted / drafted[0].proposed
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    proposed: int = 0
    accepted: int = 0


def speculate(model: Model, draft: Model, prompts: Sequence[str], *, key: Int[Tensor, "2"] | Int[Tensor, "n 2"],
              n: int = 4, max_new_tokens: int | None = None, narrow: Narrowing | None = None,
              stop: Sequence[str] = ()) -> list[Speculation]:
    """Complete every prompt as `text_completion` does, with a draft model that proposes `n` tokens in each round.

    `narrow` is the result of `narrowing`; None changes no logits. The text is the one that `text_completion` writes
    with the same key and with a `sampler` of the same settings, token by token and up to rounding. The draft model
    changes the speed and never the text. `key`, `max_new_tokens` and `stop` mean the same as there (Leviathan et al.
    2023, "Fast inference from transformers via speculative decoding").

    Raises `ValueError` as `text_completion` does, for a draft model with another vocabulary, and for `n` below 1. (An
    axis has different sizes in the two models, so this function is not `typed`. The functions that it calls are.)

    >>> drafted = lf.speculate(model, lf.load("stories-draft"), ["Once"], key=key, max_new_tokens=8)
    """
    if isinstance(prompts, str):
        raise ValueError("speculate: prompts is one text; put it in a list")

    results = [Speculation() for _ in prompts]
    stopped = stops(model.tokenizer, prompts, stop)
    for round in _rounds(model, draft, prompts, key, n, max_new_tokens, narrow, stop, stopped):
        results[round.row] = _after(results[round.row], round)
    return [x._replace(text="".join(until(model.tokenizer.decode_stream(x.tokens, prompt != ""), stop)))
            for x, prompt in zip(results, prompts, strict=True)]


def speculate_stream(model: Model, draft: Model, prompt: str, *, key: Int[Tensor, "2"], n: int = 4,
                     max_new_tokens: int | None = None, narrow: Narrowing | None = None,
                     stop: Sequence[str] = ()) -> Iterator[tuple[str, Speculation]]:
    """Complete one prompt as `speculate` does, and return the text in pieces as it is written.

    Each piece comes with the `Speculation` up to it. The last piece is the empty string.

    Raises `ValueError` as `speculate` does, when it is called and not with the first piece.

    >>> for piece, so_far in lf.speculate_stream(model, model, "Once", key=key, max_new_tokens=8):
    ...     print(piece, end="")
    """
    so_far = Speculation()
    rounds = _rounds(model, draft, [prompt], key, n, max_new_tokens, narrow, stop)

    def ids() -> Iterator[int]:
        nonlocal so_far
        for round in rounds:
            so_far = _after(so_far, round)
            yield from round.tokens

    def pieces() -> Iterator[tuple[str, Speculation]]:
        nonlocal so_far
        for piece in until(model.tokenizer.decode_stream(ids(), prompt != ""), stop):
            so_far = so_far._replace(text=so_far.text + piece)
            yield piece, so_far
        yield "", so_far

    return pieces()


def _rounds(model: Model, draft: Model, prompts: Sequence[str], key: Tensor, n: int, max_new_tokens: int | None,
            narrow: Narrowing | None, stop: Sequence[str],
            stopped: Callable[[int, int], bool] = lambda row, token: False) -> Iterator[Round]:
    """Check all arguments at once; then the rounds come one at a time."""
    check_stop(stop)
    check_tokenizer(model)
    check_tokenizer(draft)
    if (n := integer("n", n)) < 1:
        raise ValueError(f"n must be at least 1 proposed token a round, got {n}")
    _check_vocabulary(model, draft)
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    limits = [token_limit(model.params, len(ids), max_new_tokens) for ids in encoded]
    keys = keys_of(key, len(encoded), model.params)
    return rounds(model.params, draft.params, encoded, keys, narrow or narrowing(), n, model.tokenizer.ends, limits,
                  stopped)


def _after(so_far: Speculation, round: Round) -> Speculation:
    return Speculation(so_far.text, (*so_far.tokens, *round.tokens), so_far.proposed + round.proposed,
                       so_far.accepted + round.accepted)


def _check_vocabulary(model: Model, draft: Model) -> None:
    sizes = [x.params.config.vocab_size for x in (draft, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the draft model has a vocabulary of {sizes[0]} tokens, the model one of {sizes[1]}; "
                         "both need the same tokenizer")
    if any(getattr(draft.tokenizer, name) != getattr(model.tokenizer, name) for name in ("model", "names")):
        raise ValueError("the draft model and the model have different tokenizers, so their tokens mean different "
                         "words; both need the same tokenizer")
