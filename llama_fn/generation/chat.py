"""Chat: answers to whole dialogs, as in Meta's `chat_completion`, and the tokens of dialogs.

In LLaMA 2's format an exchange is ``<s>[INST] question [/INST] answer </s>``. The system message stands in the first
question, between ``<<SYS>>`` and ``<</SYS>>`` (Touvron et al. 2023, appendix A.3.3; `chat_completion` in Meta's
llama/generation.py). If a model came with a chat template for another format, its tokenizer holds that template.
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
    """One message of a dialog, as in ``{"role": "user", "content": "Who was it?"}``.

    ``tokens`` is only present in a saved conversation, at an answer for which the model drew other tokens than the
    tokenizer gives for the same text.

    >>> question: lf.Message = {"role": "user", "content": "Who?"}
    """

    role: Literal["system", "user", "assistant"]
    content: str
    tokens: NotRequired[list[int]]


@typed
def chat_completion(model: Model, dialogs: Sequence[Sequence[Message]], *, key: Int[Tensor, "2"] | Int[Tensor, "n 2"],
                    max_new_tokens: int | None = None, sampler: Sampler | None = None,
                    logprobs: bool = False, adapters: Lora | None = None) -> list[Completion]:
    """The assistant's answer to every dialog (``chat_completion`` in Meta's llama/generation.py).

    A dialog may begin with a system message. Then user and assistant take turns, and the last message is the user's.
    All arguments but `dialogs` mean the same as in `text_completion`. If the model has a chat template of another
    format, the name of a special token in a message is plain text.

    Raises `ValueError` for roles in another order, for a dialog that leaves no room for an answer, and for a message
    that contains one of LLaMA 2's own tags (Meta refuses those, too). With a chat template it also does so if the
    template cannot be rendered or refuses the dialog, and if jinja2 is missing.

    >>> answers = lf.chat_completion(model, [[{"role": "user", "content": "Who?"}]], key=key, max_new_tokens=8)
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
    """The token ids of a dialog that ends with a question.

    They are those of Meta's `chat_completion`, or those of the model's own chat template (see `by_meta`).
    """
    split_dialog(dialog)
    if not by_meta(tokenizer):
        return template.tokens(tokenizer, dialog)
    for i, message in enumerate(dialog):
        check_tags(message["content"], f"message {i}")
    return [id for ids, _ in segments(tokenizer, dialog) for id in ids]


def segments(tokenizer: Tokenizer, dialog: Sequence[Message]) -> list[tuple[list[int], bool]]:
    """The token ids of a dialog in pieces, and for each piece whether it is an answer with its end token.

    Pieces that are answers and pieces that are not take turns. If nothing follows the last answer, it is the last
    piece. The joined pieces are `dialog_ids`. Here the dialog may also end with an answer, and answers may contain
    tags, as a model may write anything. Raises `ValueError` for roles in another order, and for a tag of LLaMA 2's
    format in any other message.
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
    return _meta_segments(tokenizer, system, turns)


def _meta_segments(tokenizer: Tokenizer, system: str | None, turns: Sequence[str]) -> list[tuple[list[int], bool]]:
    """The pieces of `segments` in Meta's format."""
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
    """The tokens that end an answer. In Meta's format they are a space, if it is a token, and the end token."""
    if not by_meta(tokenizer):
        return template.closing(tokenizer)
    space = tokenizer.processor.piece_to_id("\u2581")
    return (*[space] * (not tokenizer.processor.is_unknown(space)), tokenizer.eos_id)


def check_messages(tokenizer: Tokenizer, system: str | None, question: str) -> None:
    """Raise `ValueError` for a tag of LLaMA 2's format in a message, if the dialogs of this model have that format."""
    if by_meta(tokenizer):
        check_tags(system or "", "the system's message")
        check_tags(question, "the message")


def by_meta(tokenizer: Tokenizer) -> bool:
    """Whether dialogs have Meta's format: the model has no chat template, or it has LLaMA 2's.

    A template counts as LLaMA 2's if it gives Meta's tokens for two sample dialogs. Versions of transformers differ in
    whether the tokenizer puts a space after the begin token (``legacy``), so either way is accepted. If jinja2 is
    missing, nothing can be rendered, and a template counts as LLaMA 2's if it contains its four tags. That guess is
    wrong for a format with the same tags and other spaces.
    """
    if not tokenizer.chat_template:
        return True
    if not all(tag in tokenizer.chat_template for tag in TAGS):
        return False
    if importlib.util.find_spec("jinja2") is None:
        return True
    turns, systems = ["Who was it?", "A fox.", "And then?"], (None, "Be brief.")
    expected = [[id for ids, _ in _meta_segments(tokenizer, system, turns) for id in ids] for system in systems]
    try:
        return any([template.tokens(spaced, dialog_with(system, turns)) for system in systems] == expected
                   for spaced in (tokenizer, dataclasses.replace(tokenizer, legacy=not tokenizer.legacy)))
    except ValueError:
        return False


def dialog_with(system: str | None, turns: Sequence[str]) -> list[Message]:
    """The messages of a dialog: the inverse of `split_dialog`."""
    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*begin, *({"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns))]


def split_dialog(dialog: Sequence[Message], open: bool = True) -> tuple[str | None, list[str]]:
    """The system message (or None) and the contents of all other messages, which alternate, the user's first.

    If the dialog is `open` for an answer, the last message must be the user's. Raises `ValueError` for anything else.
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
    """A question in Meta's format. The first one of a dialog includes the system message."""
    if system is not None:
        question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
    return f"[INST] {question.strip()} [/INST]"


def check_tags(text: str, where: str) -> None:
    """Raise `ValueError` for a text with a tag, which the model would read as the beginning of another message."""
    if found := [tag for tag in TAGS if tag in text]:
        raise ValueError(f"{where} contains {found[0]!r}, a tag of the chat format itself, which is not allowed; "
                         "spell it differently")
