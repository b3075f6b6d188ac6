"""A conversation as a list of messages, and the conversation of such a list."""

from collections.abc import Sequence

from llama_fn.generation.chat import Message, dialog_with, segments, split_dialog
from llama_fn.generation.conversation import Chat, Exchange, prompted
from llama_fn.tokenizer import Tokenizer


def dialog_of(tokenizer: Tokenizer, chat: Chat) -> list[Message]:
    """The conversation as messages, in the form that `chat_completion` takes.

    An answer comes with its tokens if they differ from those that the tokenizer gives for its text.
    """
    answers = [tokenizer.decode(exchange.answer).strip() for exchange in chat.exchanges]
    turns = [text for exchange, answer in zip(chat.exchanges, answers, strict=True)
             for text in (exchange.question, answer)]
    unanswered = bool(chat.exchanges) and not chat.exchanges[-1].answer
    dialog = dialog_with(chat.system, turns[:len(turns) - unanswered])
    own = chat_of(tokenizer, dialog).exchanges
    for message, exchange, other in zip(dialog[chat.system is not None:][1::2], chat.exchanges, own, strict=False):
        if exchange.answer != other.answer:
            message["tokens"] = list(exchange.answer)
    return dialog


def chat_of(tokenizer: Tokenizer, dialog: Sequence[Message]) -> Chat:
    """The conversation of a list of messages: the inverse of `dialog_of`. The last message may be an answer.

    An answer gets the tokens that come with it. If there are none, or if they do not spell its content (after an edit,
    or with another tokenizer), it gets the tokens that the tokenizer gives for its content. Raises `ValueError` as
    `segments` does, and for ``tokens`` that are not a list of integers.
    """
    system, turns = split_dialog(dialog, open=False)
    bare = [text.strip() if i % 2 else text for i, text in enumerate(turns)]
    answers = [tuple(ids) for ids, is_answer in segments(tokenizer, dialog_with(system, bare)) if is_answer]
    for i, message in enumerate(dialog[system is not None:][1::2]):
        tokens, size = message.get("tokens", []), tokenizer.vocab_size
        if not isinstance(tokens, list) or any(type(id) is not int for id in tokens):
            raise ValueError(f'the "tokens" of answer {i} must be a list of token ids')
        known = bool(tokens) and all(0 <= id < size for id in tokens)
        if known and tokenizer.decode(tokens).strip() == message["content"].strip():
            answers[i] = tuple(tokens)
    questions = turns[::2]
    answers += [()] * (len(questions) - len(answers))
    exchanges = tuple(Exchange(question, (), answer) for question, answer in zip(questions, answers, strict=True))
    return prompted(tokenizer, Chat(system, exchanges))
