"""Dialogs by the chat template that came with a model, for models that do not follow Meta's rules.

A template is text with the names of special tokens in it, which stand for those tokens. In what somebody said they are
plain text: a mark, a character that appears nowhere else, breaks each such name while the template is rendered, and the
text is cut at the marks before it is encoded. The mark stands within the name, so that a template may trim what was
said. A template that takes a message apart and joins it anew in another order could make a name of its pieces; and
names of one character are not broken.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llama_fn.tokenizer import Tokenizer


class Answer(NamedTuple):
    """Where an answer is among the tokens of a dialog: it begins, its words end, and its end token ends it."""

    begin: int
    words: int
    end: int


def tokens(tokenizer: Tokenizer, dialog: Sequence[Mapping]) -> list[int]:
    """The ids of a dialog. Where the user has the last word, they lead up to an answer.

    They are those of transformers' `apply_chat_template` for all that holds no name of a special token. Raises
    `ValueError` for a template that cannot be rendered, for one that refuses the dialog, and where jinja2 is missing.
    """
    mark, *_ = _unused(tokenizer, dialog)
    break_names = _breaker(tokenizer, mark)
    said = [{"role": message["role"], "content": break_names(message["content"])} for message in dialog]
    return _encoded(tokenizer, _render(tokenizer, said), mark)


def answers(tokenizer: Tokenizer, dialog: Sequence[Mapping]) -> tuple[list[int], list[Answer]]:
    """The ids of a dialog, and where the assistant's answers are among them. An empty answer counts as "a".

    Raises `ValueError` as `tokens` does, and for a template that does not give every answer as it was said.
    """
    mark, begin, end = _unused(tokenizer, dialog)
    break_names, said, marked = _breaker(tokenizer, mark), [], []
    for message in dialog:
        text, role = break_names(message["content"]), message["role"]
        text = "a" if role == "assistant" and not text.strip() else text
        said.append({"role": role, "content": text})
        if role == "assistant":  # white space around the words stays outside, where a template may trim it
            words = text.strip()
            text = text.replace(words, f"{begin}{words}{end}", 1)
        marked.append({"role": role, "content": text})
    whole, parts = _render(tokenizer, said), re.split(f"[{begin}{end}]", _render(tokenizer, marked))
    if whole != "".join(parts) or len(parts) != 1 + 2 * sum(x["role"] == "assistant" for x in dialog):
        raise ValueError("the chat template changes what the assistant said, so that its tokens cannot be told from "
                         "the others")
    ids = _encoded(tokenizer, whole, mark)

    def place(text: str) -> int:
        """Of how many tokens the text is. One that goes on beyond it belongs to what follows."""
        return common(_encoded(tokenizer, text, mark), ids)

    # A space before the words is theirs, as it is a model's to write, unless the template opens every answer with one.
    opened = _render(tokenizer, [{"role": "user", "content": "a"}]).endswith(" ")
    ends, found, text = _ends(tokenizer), [], ""
    for before, words, after in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
        text += before
        start, text = place(text if opened else text.rstrip(" ")), text + words
        closed = text + match[0] if (match := ends.match(after)) else text
        found.append(Answer(start, place(text), place(closed)))
    return ids, found


def closing(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens with which the template ends an answer, up to its end token; none if it has none."""
    ids, (answer,) = answers(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}])
    return tuple(ids[answer.words:answer.end])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _render(tokenizer: Tokenizer, said: Sequence[Mapping]) -> str:
    try:
        from llama_fn.generation.sandbox import compiled
    except ImportError:
        raise ValueError("this model has a chat template of its own, and jinja2, which renders it, is not installed: "
                         'pip install "jinja2>=3.1.6"') from None
    return compiled(tokenizer.chat_template or "")(
        messages=said, add_generation_prompt=said[-1]["role"] != "assistant", tools=None, documents=None,
        **_token_names(tokenizer))


def _token_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The names by which a template calls tokens: those of the model's, if the folder gives no others."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.processor.unk_id()}
    return {name: tokenizer.processor.id_to_piece(id) for name, id in ids.items() if id >= 0} | dict(
        tokenizer.token_names)


def _ends(tokenizer: Tokenizer) -> re.Pattern:
    """White space and the name of an end token."""
    ends = {name for name, id in tokenizer.specials.items() if id in tokenizer.ends}
    ends |= {name for kind, name in _token_names(tokenizer).items() if kind == "eos_token" and name}
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, sorted(ends, key=len, reverse=True))) or '(?!)'})")


def _unused(tokenizer: Tokenizer, dialog: Sequence[Mapping]) -> list[str]:
    """Three characters that neither the dialog nor the template has, of those that Unicode leaves to everybody."""
    used = {*(tokenizer.chat_template or ""), *(x for message in dialog for x in message["content"])}
    return list(itertools.islice((x for x in map(chr, range(0xF0000, 0x110000)) if x not in used), 3))


def _breaker(tokenizer: Tokenizer, mark: str) -> Callable[[str], str]:
    """A function that puts the mark into every name of a special token in a text, after its first character."""
    names = {*tokenizer.specials, *_token_names(tokenizer).values()} - {""}
    name = re.compile(rf"(?=(?:{'|'.join(map(re.escape, names))}))(.)", re.DOTALL)
    return lambda text: name.sub(rf"\1{mark}", text)


def _encoded(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    """The tokens of a text in which names stand for tokens, but for those that a mark breaks."""
    first, *rest = text.split(mark)
    ids, begin = tokenizer.encode(first, bos=False, special=True), tokenizer.encode("\n", bos=False)
    for part in rest:  # after a line's end, which no token goes across, there is no space that begins a text
        ids += tokenizer.encode("\n" + part, bos=False, special=True)[len(begin):]
    return ids
