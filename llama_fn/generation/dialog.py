"""A dialog as training data: its tokens, and which of them the model is to learn."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama_fn.generation.chat import Message, segments
from llama_fn.shapes import typed
from llama_fn.tokenizer import Tokenizer


class DialogTokens(NamedTuple):
    """The tokens of a dialog, and a mask that is true at the tokens to learn.

    >>> tokens, mask = lf.dialog_tokens(tokenizer, dialog)
    """

    tokens: Int[Tensor, "t"]
    mask: Bool[Tensor, "t"]


@typed
def dialog_tokens(tokenizer: Tokenizer, dialog: Sequence[Message]) -> DialogTokens:
    """The tokens of a dialog, as `chat_completion` gives them to the model, and a mask for `loss`.

    The mask is true at the tokens of the assistant's answers and at the token that ends each answer. It is false at the
    system message, at the user's messages and at everything that the chat format adds. The mask belongs to the tokens
    that are predicted: ``loss(params, tokens, mask)`` trains the model to write the answers and to end them. To batch
    dialogs of different lengths, pad both with ``torch.nn.utils.rnn.pad_sequence(..., batch_first=True)``; the padding
    is then masked.

    The dialog may end with an answer or with a question. Raises `ValueError` for an empty dialog, for roles in another
    order, and for a tag of the chat format in a message of the system or the user.

    >>> loss = lf.loss(params, *lf.dialog_tokens(tokenizer, [{"role": "user", "content": "Who?"}]))
    """
    parts = segments(tokenizer, dialog)
    if not parts:
        raise ValueError("the dialog has no question and no answer; it goes (system,) user, assistant, user, ...")
    return DialogTokens(torch.tensor([id for ids, _ in parts for id in ids]),
                        torch.tensor([is_answer for ids, is_answer in parts for _ in ids]))
