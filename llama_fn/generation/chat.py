"""Chat in LLaMA 2's format: whole dialogs, as Meta's `chat_completion` takes them.

An exchange is `<s>[INST] question [/INST] answer </s>`; the system's words stand in the first question, between
`<<SYS>>` and `<</SYS>>` (Touvron et al. 2023, appendix A.3.3; `chat_completion` in Meta's llama/generation.py).
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation.completion import Completion, complete
from llama_fn.generation.sampling import Sampler
from llama_fn.shapes import typed
from llama_fn.tokenizer import Tokenizer
from llama_fn.transforms.lora import Lora

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Message(TypedDict):
    """One turn of a dialog."""

    role: Literal["system", "user", "assistant"]
    content: str


@typed
def chat_completion(model: Model, dialogs: Sequence[Sequence[Message]], *, key: Int[Tensor, "2"] | Int[Tensor, "n 2"],
                    max_new_tokens: int | None = None, sampler: Sampler | None = None,
                    logprobs: bool = False, adapters: Lora | None = None) -> list[Completion]:
    """The assistant's answer to every dialog. A dialog may begin with the system's message; then user and assistant
    take turns, and the user has the last word.

    Keys, rows, limits and adapters are those of `text_completion`. Raises `ValueError` for a dialog in another order,
    for one that leaves no room for an answer, and for a message with one of the format's own tags in it, which Meta
    refuses.
    """
    check_tokenizer(model)
    if not dialogs:
        return []
    encoded = [_encode(model.tokenizer, i, dialog) for i, dialog in enumerate(dialogs)]
    written, nats, _ = complete(model.params, encoded, key, max_new_tokens, sampler, logprobs,
                                ends=(model.tokenizer.eos_id,), adapters=adapters)
    return [Completion(model.tokenizer.decode(ids), ids, row if logprobs else None)
            for ids, row in zip(written, nats, strict=True)]


def dialog_tokens(tokenizer: Tokenizer, dialog: Sequence[Message]) -> list[int]:
    """The ids that Meta's `chat_completion` makes of a dialog."""
    system, turns = split_dialog(dialog)
    tokens: list[int] = []
    for i in range(0, len(turns), 2):
        question = request(turns[i], system if i == 0 else None)
        if i + 1 < len(turns):
            tokens += tokenizer.encode(f"{question} {turns[i + 1].strip()} ", eos=True)
        else:
            tokens += tokenizer.encode(question)
    return tokens


def split_dialog(dialog: Sequence[Message], open: bool = True) -> tuple[str | None, list[str]]:
    """The system's words, if there are any, and what user and assistant said in turns, the user first and, if it is
    `open` for an answer, last.
    """
    for i, message in enumerate(dialog):
        if not (isinstance(message, Mapping) and all(isinstance(message.get(x), str) for x in ("role", "content"))):
            raise ValueError(f'message {i} of a dialog needs strings under "role" and "content", got {message!r}')
        check_tags(message["content"], f"message {i}")
    roles = [message["role"] for message in dialog]
    first = int(roles[:1] == ["system"])
    expected = ["system"] * first + ["user", "assistant"] * len(roles)
    if roles != expected[:len(roles)] or (open and roles[-1:] != ["user"]):
        raise ValueError(f"a dialog goes (system,) user, assistant, user, ...{', and ends with the user' * open}, got "
                         f"{', '.join(roles) or 'no message'}")
    return (dialog[0]["content"] if first else None), [message["content"] for message in dialog[first:]]


def _encode(tokenizer: Tokenizer, i: int, dialog: Sequence[Message]) -> list[int]:
    try:
        return dialog_tokens(tokenizer, dialog)
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
