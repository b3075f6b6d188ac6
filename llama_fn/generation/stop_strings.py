"""Stop strings: end a text that is written piece by piece before one of several strings."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from llama_fn.tokenizer import Tokenizer

MOST_WITHOUT_TEXT = 8  # how many tokens that have given no text are decoded again together with the next token


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces of a text, up to the first of the strings in `stop` and without it."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [at for s in stop if (at := held.find(s)) >= 0]:
            held = held[:min(found)]
            break
        safe = len(held) - max((_overlap(held, s) for s in stop), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def stops(tokenizer: Tokenizer, prompts: Sequence[str], stop: Sequence[str]) -> Callable[[int, int], bool]:
    """A function ``stopped(row, token)`` that is called with each new token of a row, in order.

    It returns whether the row's new text contains a string of `stop`. A character counts as soon as its last byte is
    there. Only the end of the text is kept, in which a stop string may have begun, so that the cost of a token does not
    depend on the length of the text.
    """
    keep = max(map(len, stop), default=1) - 1
    held = [""] * len(prompts)
    undecoded: list[list[int]] = [[] for _ in prompts]
    continued = [prompt != "" for prompt in prompts]

    def stopped(row: int, token: int) -> bool:
        if not stop:
            return False
        tokens = [*undecoded[row], token]
        text, waiting = _decoded(tokenizer, tokens, continued[row])
        # The next token may need the tokens before it: the rest of a character's bytes, or the begin token, after
        # which the first word loses its space.
        kept = waiting if text else MOST_WITHOUT_TEXT
        undecoded[row], continued[row] = tokens[max(0, len(tokens) - kept):], continued[row] or text != ""
        text = held[row] + text
        held[row] = text[len(text) - min(keep, len(text)):]
        return any(s in text for s in stop)

    return stopped


def _decoded(tokenizer: Tokenizer, tokens: list[int], continued: bool) -> tuple[str, int]:
    """The text of the tokens up to the last complete character, and how many bytes of the next one they hold."""
    ended, text, begun = False, "", ""

    def ids() -> Iterator[int]:
        nonlocal ended
        yield from tokens
        ended = True

    for piece in tokenizer.decode_stream(ids(), continued):
        if ended:  # the last piece: one U+FFFD for each byte of an incomplete character
            begun += piece
        else:
            text += piece
    return text, len(begun)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: Sequence[str]) -> None:
    """Raise `ValueError` for an empty stop string, and for a single string instead of a list."""
    if isinstance(stop, str):
        raise ValueError("stop is one string; put it in a list, or each of its characters would stop the text")
    if any(not s for s in stop):
        raise ValueError("a stop string is empty: it would stop every text before it begins")
