"""Chat: whole dialogs, as Meta's `chat_completion` takes them, and their tokens.

In LLaMA 2's format an exchange is `<s>[INST] question [/INST] answer </s>`; the system's words stand in the first
question, between `<<SYS>>` and `<</SYS>>` (Touvron et al. 2023, appendix A.3.3; `chat_completion` in Meta's
llama/generation.py). A model that came with a chat template for another format has it in its tokenizer.
"""

import dataclasses
import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NotRequired, TypedDict

from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation import template
from llama_fn.generation.completion import Completion, complete
from llama_fn.generation.sampling import Sampler
from llama_fn.shapes import typed
from llama_fn.tokenizer import Tokenizer
from llama_fn.transforms.lora import Lora

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Message(TypedDict):
    """One turn of a dialog. `tokens` are those of an answer that was drawn, where its content's own are others; only a
    saved conversation has them.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    tokens: NotRequired[list[int]]


@typed
def chat_completion(model: Model, dialogs: Sequence[Sequence[Message]], *, key: Int[Tensor, "2"] | Int[Tensor, "n 2"],
                    max_new_tokens: int | None = None, sampler: Sampler | None = None,
                    logprobs: bool = False, adapters: Lora | None = None) -> list[Completion]:
    """The assistant's answer to every dialog. A dialog may begin with the system's message; then user and assistant
    take turns, and the user has the last word.

    Keys, rows, limits and adapters are those of `text_completion`. Raises `ValueError` for a dialog in another order,
    for one that leaves no room for an answer, and for a message with one of LLaMA 2's own tags in it, which Meta
    refuses. With a chat template of another format, names of special tokens in a message are plain text; it raises
    `ValueError`, too, if the template cannot be rendered or refuses the dialog, or if jinja2 is missing.
    """
    check_tokenizer(model)
    if not dialogs:
        return []
    encoded = [_encode(model.tokenizer, i, dialog) for i, dialog in enumerate(dialogs)]
    written, nats, _ = complete(model.params, encoded, key, max_new_tokens, sampler, logprobs,
                                ends=model.tokenizer.ends, adapters=adapters)
    return [Completion(model.tokenizer.decode(ids), ids, row if logprobs else None)
            for ids, row in zip(written, nats, strict=True)]


def dialog_ids(tokenizer: Tokenizer, dialog: Sequence[Message]) -> list[int]:
    """The ids of a dialog that an answer is to follow: those of Meta's `chat_completion`, or of the model's own chat
    template (see `by_meta`).
    """
    split_dialog(dialog)
    if not by_meta(tokenizer):
        return template.tokens(tokenizer, dialog)
    for i, message in enumerate(dialog):
        check_tags(message["content"], f"message {i}")
    return [id for ids, _ in segments(tokenizer, dialog) for id in ids]


def segments(tokenizer: Tokenizer, dialog: Sequence[Message]) -> list[tuple[list[int], bool]]:
    """The ids of a dialog in pieces, and of each whether it is the assistant's: its words and the end token.

    The pieces take turns. What follows the last answer comes as a piece only if it is not empty. Joined they are
    `dialog_ids`, but the assistant may have the last word, and its messages may hold tags, as what a model writes
    may. Raises `ValueError` for a dialog in another order, and for a tag of LLaMA 2's format in another message.
    """
    system, turns = split_dialog(dialog, open=False)
    if not turns:
        return []
    if not by_meta(tokenizer):
        ids, answers = template.answers(tokenizer, dialog)
        edges = [0, *(edge for answer in answers for edge in (answer.begin, answer.end)), len(ids)]
        pieces = [(ids[a:b], i % 2 == 1) for i, (a, b) in enumerate(itertools.pairwise(edges))]
        return pieces if pieces[-1][0] else pieces[:-1]
    for i, message in enumerate(dialog):
        if message["role"] != "assistant":
            check_tags(message["content"], f"message {i}")
    return _metas(tokenizer, system, turns)


def _metas(tokenizer: Tokenizer, system: str | None, turns: Sequence[str]) -> list[tuple[list[int], bool]]:
    """`segments` by Meta's rules."""
    pieces = []
    for i in range(0, len(turns), 2):
        question = request(turns[i], system if i == 0 else None)
        prompt = tokenizer.encode(question)
        if i + 1 == len(turns):
            return [*pieces, (prompt, False)]
        whole = tokenizer.encode(f"{question} {turns[i + 1].strip()} ", eos=True)
        count = template.common(prompt, whole)
        pieces += [(whole[:count], False), (whole[count:], True)]
    return pieces


def closing(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer in a dialog. Meta's rules put a space before the end token, if there is one."""
    if not by_meta(tokenizer):
        return template.closing(tokenizer)
    space = tokenizer.processor.piece_to_id("\u2581")
    return (*[space] * (not tokenizer.processor.is_unknown(space)), tokenizer.eos_id)


def check_said(tokenizer: Tokenizer, system: str | None, question: str) -> None:
    """Raise `ValueError` for a tag of LLaMA 2's format, where that is the format."""
    if by_meta(tokenizer):
        check_tags(system or "", "the system's message")
        check_tags(question, "the message")


def by_meta(tokenizer: Tokenizer) -> bool:
    """Whether dialogs follow Meta's rules: there is no chat template, or it is LLaMA 2's.

    LLaMA 2's is one that gives Meta's tokens for two dialogs, whether or not the folder's tokenizer puts a space after
    the begin token (`legacy`): transformers' versions differ in that. Where jinja2 is missing, and nothing can be
    rendered, it is one with LLaMA 2's four tags in it: a guess, which is wrong of a format with the same tags and other
    spaces.
    """
    if not tokenizer.chat_template:
        return True
    if not all(tag in tokenizer.chat_template for tag in TAGS):
        return False
    if importlib.util.find_spec("jinja2") is None:
        return True
    said, systems = ["Who was it?", "A fox.", "And then?"], (None, "Be brief.")
    metas = [[id for ids, _ in _metas(tokenizer, system, said) for id in ids] for system in systems]
    try:
        return any([template.tokens(spaced, dialog_with(system, said)) for system in systems] == metas
                   for spaced in (tokenizer, dataclasses.replace(tokenizer, legacy=not tokenizer.legacy)))
    except ValueError:
        return False


def dialog_with(system: str | None, turns: Sequence[str]) -> list[Message]:
    """The inverse of `split_dialog`."""
    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*begin, *({"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns))]


def split_dialog(dialog: Sequence[Message], open: bool = True) -> tuple[str | None, list[str]]:
    """The system's words, if there are any, and what user and assistant said in turns, the user first and, if it is
    `open` for an answer, last.
    """
    for i, message in enumerate(dialog):
        if not (isinstance(message, Mapping) and all(isinstance(message.get(x), str) for x in ("role", "content"))):
            raise ValueError(f'message {i} of a dialog needs strings under "role" and "content", got {message!r}')
    roles = [message["role"] for message in dialog]
    first = int(roles[:1] == ["system"])
    expected = ["system"] * first + ["user", "assistant"] * len(roles)
    if roles != expected[:len(roles)] or (open and roles[-1:] != ["user"]):
        raise ValueError(f"a dialog goes (system,) user, assistant, user, ...{', and ends with the user' * open}, got "
                         f"{', '.join(roles) or 'no message'}")
    return (dialog[0]["content"] if first else None), [message["content"] for message in dialog[first:]]


def _encode(tokenizer: Tokenizer, i: int, dialog: Sequence[Message]) -> list[int]:
    try:
        return dialog_ids(tokenizer, dialog)
    except ValueError as error:
        raise ValueError(f"dialog {i}: {error}") from None


def request(question: str, system: str | None = None) -> str:
    """A question in Meta's format; `system` in the first one only."""
    if system is not None:
        question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
    return f"[INST] {question.strip()} [/INST]"


def check_tags(text: str, where: str) -> None:
    """Raise `ValueError` for a text that could pass for another part of the dialog."""
    if found := [tag for tag in TAGS if tag in text]:
        raise ValueError(f"{where} contains {found[0]!r}, a tag of the chat format itself, which is not allowed; "
                         "write it in another way")
