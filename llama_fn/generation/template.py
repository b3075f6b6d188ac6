"""The tokens of dialogs by the chat template that came with a model, for models without Meta's chat format.

A rendered template contains names of special tokens, and each name stands for its token. In a message, such a name must
stay plain text. So a mark, which is a character that appears nowhere else, is put into each such name before the
template is rendered, and the rendered text is split at the marks before it is encoded. The mark stands inside the name,
so that a template may still trim the message. Two cases are not covered: a name of one character, and a template that
joins parts of a message in another order, so that the parts form a name.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llama_fn.tokenizer import Tokenizer


class Answer(NamedTuple):
    """The place of an answer in the tokens of a dialog: where it begins, where its text ends, and where it ends.

    Between the last two are the tokens that end an answer.
    """

    begin: int
    text_end: int
    end: int


def tokens(tokenizer: Tokenizer, dialog: Sequence[Mapping]) -> list[int]:
    """The token ids of a dialog. After a message of the user, they include the beginning of an answer.

    They are those of ``apply_chat_template`` in transformers, unless a message contains the name of a special token.
    Raises `ValueError` for a template that cannot be rendered or that refuses the dialog, and if jinja2 is missing.
    """
    mark, *_ = _unused(tokenizer, dialog)
    break_names = _breaker(tokenizer, mark)
    messages = [{"role": message["role"], "content": break_names(message["content"])} for message in dialog]
    return _encoded(tokenizer, _render(tokenizer, messages), mark)


def answers(tokenizer: Tokenizer, dialog: Sequence[Mapping]) -> tuple[list[int], list[Answer]]:
    """The token ids of a dialog, and the places of the assistant's answers. An empty answer is rendered as "a".

    Raises `ValueError` as `tokens` does, and for a template that changes the text of an answer.
    """
    mark, begin, end = _unused(tokenizer, dialog)
    break_names, messages, marked = _breaker(tokenizer, mark), [], []
    for message in dialog:
        text, role = break_names(message["content"]), message["role"]
        text = "a" if role == "assistant" and not text.strip() else text
        messages.append({"role": role, "content": text})
        if role == "assistant":  # the marks stand inside the white space around the answer, which a template may trim
            stripped = text.strip()
            text = text.replace(stripped, f"{begin}{stripped}{end}", 1)
        marked.append({"role": role, "content": text})
    whole, parts = _render(tokenizer, messages), re.split(f"[{begin}{end}]", _render(tokenizer, marked))
    if whole != "".join(parts) or len(parts) != 1 + 2 * sum(x["role"] == "assistant" for x in dialog):
        raise ValueError("the chat template changes the text of an answer, so that its tokens cannot be found in "
                         "the dialog")
    ids = _encoded(tokenizer, whole, mark)

    def place(text: str) -> int:
        """How many tokens the text has. A token that goes beyond its end is not counted."""
        return common(_encoded(tokenizer, text, mark), ids)

    # A space before an answer belongs to the answer, because the model writes it, unless the template always adds one.
    adds_space = _render(tokenizer, [{"role": "user", "content": "a"}]).endswith(" ")
    ends, found, text = _ends(tokenizer), [], ""
    for before, inside, after in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
        text += before
        start, text = place(text if adds_space else text.rstrip(" ")), text + inside
        closed = text + match[0] if (match := ends.match(after)) else text
        found.append(Answer(start, place(text), place(closed)))
    return ids, found


def closing(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens with which the template ends an answer, up to its end token. There are none if it has no end token."""
    ids, (answer,) = answers(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}])
    return tuple(ids[answer.text_end:answer.end])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at their beginnings two sequences have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _render(tokenizer: Tokenizer, messages: Sequence[Mapping]) -> str:
    try:
        from llama_fn.generation.sandbox import renderer
    except ImportError:
        raise ValueError("this model has a chat template, and jinja2, which renders it, is not installed: "
                         'pip install "jinja2>=3.1.6"') from None
    return renderer(tokenizer.chat_template or "")(
        messages=messages, add_generation_prompt=messages[-1]["role"] != "assistant", tools=None, documents=None,
        **_token_names(tokenizer))


def _token_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables of a template that name tokens. Names from the model's folder replace those of the tokenizer."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.processor.unk_id()}
    return {name: tokenizer.processor.id_to_piece(id) for name, id in ids.items() if id >= 0} | dict(
        tokenizer.token_names)


def _ends(tokenizer: Tokenizer) -> re.Pattern:
    """A pattern that matches white space followed by the name of an end token."""
    ends = {name for name, id in tokenizer.specials.items() if id in tokenizer.ends}
    ends |= {name for kind, name in _token_names(tokenizer).items() if kind == "eos_token" and name}
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, sorted(ends, key=len, reverse=True))) or '(?!)'})")


def _unused(tokenizer: Tokenizer, dialog: Sequence[Mapping]) -> list[str]:
    """Three characters that are neither in the dialog nor in the template, from Unicode's private use areas."""
    used = {*(tokenizer.chat_template or ""), *(x for message in dialog for x in message["content"])}
    return list(itertools.islice((x for x in map(chr, range(0xF0000, 0x110000)) if x not in used), 3))


def _breaker(tokenizer: Tokenizer, mark: str) -> Callable[[str], str]:
    """A function that puts the mark after the first character of every name of a special token in a text."""
    names = {*tokenizer.specials, *_token_names(tokenizer).values()} - {""}
    name = re.compile(rf"(?=(?:{'|'.join(map(re.escape, names))}))(.)", re.DOTALL)
    return lambda text: name.sub(rf"\1{mark}", text)


def _encoded(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    """The tokens of a text in which a name stands for its token, unless there is a mark in the name."""
    first, *rest = text.split(mark)
    ids, begin = tokenizer.encode(first, bos=False, special=True), tokenizer.encode("\n", bos=False)
    for part in rest:  # the tokenizer adds a space to the beginning of a text, but not after a newline
        ids += tokenizer.encode("\n" + part, bos=False, special=True)[len(begin):]
    return ids
