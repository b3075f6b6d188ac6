"""A dialog as what a model learns from: its tokens, and which of them are the assistant's."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama_fn.generation.chat import Message, segments
from llama_fn.shapes import typed
from llama_fn.tokenizer import Tokenizer


class DialogTokens(NamedTuple):
    """The tokens of a dialog, and a mask of those to learn."""

    tokens: Int[Tensor, "t"]
    mask: Bool[Tensor, "t"]


@typed
def dialog_tokens(tokenizer: Tokenizer, dialog: Sequence[Message]) -> DialogTokens:
    """The tokens of a dialog, those that `chat_completion` gives the model, and a mask for `loss`.

    The mask is true at each token of the assistant's answers and at the token that ends each of them; it is false at
    the system's and the user's words and at all that the format adds. `loss` counts a token where the mask is true at
    that token itself (not at the one before it), so `loss(params, tokens, mask)` trains the model to write the answers
    and to end them. Dialogs of different lengths become one batch by
    `torch.nn.utils.rnn.pad_sequence(..., batch_first=True)` of the tokens and of the masks: what is added is masked.

    The dialog may end with an answer, as one to learn from does, or with a question. Raises `ValueError` as
    `chat_completion` does for a dialog in another order, for a tag of the format in what the system or the user says,
    and for no message.
    """
    parts = segments(tokenizer, dialog)
    if not parts:
        raise ValueError("the dialog has no question and no answer: it goes (system,) user, assistant, user, ...")
    return DialogTokens(torch.tensor([id for ids, _ in parts for id in ids]),
                        torch.tensor([is_answer for ids, is_answer in parts for _ in ids]))
