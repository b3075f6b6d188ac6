"""Stop strings: where a text ends that is written a piece or a token at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from llama_fn.tokenizer import Tokenizer

MOST_SILENT = 8  # tokens in a row without any text that are decoded once more with the next one


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first of the `stop` strings in it, without it."""
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
    """A function that is told each new token of each row, and says whether the row's text now holds a `stop` string.

    The text is that of `stream`: what was written after the prompt, a character when its last byte is there. Of it,
    only an end is kept, in which a stop string may have begun, so that a token costs the same however long the text is.
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
        # A token without text may decide how the next one is decoded (a text's first word loses its space).
        kept = waiting if text else MOST_SILENT
        undecoded[row], continued[row] = tokens[max(0, len(tokens) - kept):], continued[row] or text != ""
        text = held[row] + text
        held[row] = text[len(text) - min(keep, len(text)):]
        return any(s in text for s in stop)

    return stopped


def _decoded(tokenizer: Tokenizer, tokens: list[int], continued: bool) -> tuple[str, int]:
    """The text of tokens up to the last whole character, and how many tokens (a byte each) have begun another."""
    ended, text, begun = False, "", ""

    def ids() -> Iterator[int]:
        nonlocal ended
        yield from tokens
        ended = True

    for piece in tokenizer.decode_stream(ids(), continued):
        if ended:  # the stream's last piece: a U+FFFD for each byte that waited
            begun += piece
        else:
            text += piece
    return text, len(begun)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: Sequence[str]) -> None:
    """Raise `ValueError` for stop strings that would end every text, or are none."""
    if isinstance(stop, str):
        raise ValueError("stop is one string; put it in a list, or each of its characters would stop the text")
    if any(not s for s in stop):
        raise ValueError("a stop string is empty: it would stop every text before it begins")
