"""A conversation as a value: what was said, as tokens, and a cache of them that goes on from turn to turn."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation import decode
from llama_fn.generation.chat import Message, check_said, closing, dialog_with, segments, split_dialog
from llama_fn.generation.completion import room
from llama_fn.generation.sampling import Sampler
from llama_fn.generation.sampling import sampler as make_sampler
from llama_fn.generation.template import common
from llama_fn.model.cache import Cache, NoCache
from llama_fn.shapes import typed
from llama_fn.tokenizer import Tokenizer


class Exchange(NamedTuple):
    """A question as it was asked, its tokens, and the tokens of the answer so far."""

    question: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Chat(NamedTuple):
    """A conversation: the system's words, the exchanges, and the cache of a beginning of their tokens.

    An old value can be gone on with again, otherwise. What was answered keeps the tokens that were drawn.
    """

    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()
    cache: Cache | NoCache | None = NoCache()

    @property
    def tokens(self) -> list[int]:
        """All tokens so far: those of the same dialog, wherever the answers' tokens are the tokenizer's own."""
        return [id for exchange in self.exchanges for id in (*exchange.prompt, *exchange.answer)]


class ContextFull(ValueError):
    """A conversation is longer than the model's context."""


@typed
def ask(model: Model, chat: Chat, question: str) -> Chat:
    """The conversation with a question more, for `answer` to go on with.

    Raises `ContextFull` if nothing could be answered, and `ValueError` as `chat_completion` does, for a tag in the
    question or in the system's words.
    """
    check_tokenizer(model)
    check_said(model.tokenizer, chat.system, question)
    end = closing(model.tokenizer)
    exchanges = (*(_closed(end, exchange) for exchange in chat.exchanges), Exchange(question, (), ()))
    asked = _prompted(model.tokenizer, chat._replace(exchanges=exchanges))
    known = common(chat.tokens, asked.tokens)  # all, but for a template that writes what was said anew in every turn
    if chat.cache and int(chat.cache.length) > known:
        asked = asked._replace(cache=chat.cache._replace(length=chat.cache.length.clamp(max=known)))
    count, context = len(asked.tokens), model.params.config.max_seq_len
    new = len(asked.exchanges[-1].prompt)
    if count >= context:
        raise ContextFull(f"the context of {context} tokens is full: the conversation has "
                          f"{count - new}, this message {new}, and an answer needs some")
    return asked


@typed
def answer(model: Model, chat: Chat, *, key: Int[Tensor, "2"], max_new_tokens: int | None = None,
           sampler: Sampler | None = None) -> Iterator[tuple[str, Chat]]:
    """The answer in pieces of text as they come, each with the conversation up to it; the last piece is "".

    Only what the cache does not hold yet goes through the model. The answer ends at the model's end token, after
    `max_new_tokens`, or at the context's end; any but the first can be gone on with. Draws fold the position into the
    key, as `text_completion` does.

    Raises at once `ContextFull`, and `ValueError` for a conversation with nothing to answer.
    """
    check_tokenizer(model)
    tokens, latest, context = chat.tokens, chat, model.params.config.max_seq_len
    end = closing(model.tokenizer)
    ended = ((model.tokenizer.eos_id,), end[-1:] or None)  # the answer: a question may end with that token, too
    if not tokens or chat.exchanges[-1].answer[-1:] in ended:
        raise ValueError("there is nothing to answer: ask first")
    if len(tokens) >= context:
        raise ContextFull(f"the context of {context} tokens is full: the conversation has {len(tokens)}")
    limit = room(model.params, len(tokens), max_new_tokens)
    *before, last = chat.exchanges
    drawn: list[int] = []

    def ids() -> Iterator[int]:
        nonlocal latest
        state = decode.resume(model.params, tokens, chat.cache, len(tokens) + limit)
        latest = latest._replace(cache=state.cache)
        keys = key[None].to(model.params.embedding.device)
        sample = sampler or make_sampler()
        for step in decode.steps(model.params, state, keys, sample, model.tokenizer.ends, [limit],
                                 run=decode.step_for(model.params, 1, sample)):
            drawn.append(step.token)
            so_far = last._replace(answer=(*last.answer, *drawn))
            latest = chat._replace(exchanges=(*before, so_far), cache=step.state.cache)
            yield step.token

    def pieces() -> Iterator[tuple[str, Chat]]:
        for piece in model.tokenizer.decode_stream(itertools.chain(last.answer, ids())):
            if drawn:  # what comes before is told already
                yield piece, latest
        ended = latest.exchanges[-1] if len(drawn) == limit else _closed(end, latest.exchanges[-1])
        yield "", latest._replace(exchanges=(*before, ended))

    return pieces()


def unanswered(chat: Chat) -> Chat:
    """The conversation with its last answer taken back, for `answer` to give another one.

    Raises `ValueError` if nothing was asked.
    """
    if not chat.exchanges:
        raise ValueError("nothing was asked yet")
    *before, last = chat.exchanges
    asked = chat._replace(exchanges=(*before, last._replace(answer=())))
    if not chat.cache:
        return asked
    return asked._replace(cache=chat.cache._replace(length=chat.cache.length.clamp(max=len(asked.tokens))))


def drop(model: Model, chat: Chat, count: int) -> Chat:
    """The conversation without its `count` oldest exchanges; the system's words move to the first that stays.

    Positions change with it, so all that stays goes through the model again. Raises `ValueError` for more exchanges
    than there are.
    """
    check_tokenizer(model)
    if not 0 <= count <= len(chat.exchanges):
        raise ValueError(f"of {len(chat.exchanges)} exchanges {count} cannot be dropped")
    return chat if count == 0 else _prompted(model.tokenizer, Chat(chat.system, chat.exchanges[count:]))


def with_system(model: Model, chat: Chat, system: str | None) -> Chat:
    """The conversation as it would stand under other words of the system. Raises `ValueError` for a tag in them."""
    check_tokenizer(model)
    check_said(model.tokenizer, system, "")
    _prompted(model.tokenizer, Chat(system, (Exchange("", (), ()),)))  # refused at once, if nothing was asked yet, too
    return _prompted(model.tokenizer, Chat(system, chat.exchanges))


def dialog_of(tokenizer: Tokenizer, chat: Chat) -> list[Message]:
    """The conversation as messages, as `chat_completion` takes them (with a question as the last). An answer's tokens
    come with it where they are not those that its content has.
    """
    said = [tokenizer.decode(exchange.answer).strip() for exchange in chat.exchanges]
    turns = [text for exchange, answer in zip(chat.exchanges, said, strict=True)
             for text in (exchange.question, answer)]
    opened = bool(chat.exchanges) and not chat.exchanges[-1].answer
    dialog = dialog_with(chat.system, turns[:len(turns) - opened])
    own = chat_of(tokenizer, dialog).exchanges
    for message, exchange, other in zip(dialog[chat.system is not None:][1::2], chat.exchanges, own, strict=False):
        if exchange.answer != other.answer:
            message["tokens"] = list(exchange.answer)
    return dialog


def chat_of(tokenizer: Tokenizer, dialog: Sequence[Message]) -> Chat:
    """The inverse of `dialog_of`. The assistant may have the last word.

    Answers get the tokens that come with them, and their content's own where there are none or where those do not spell
    it, as after an edit or with another tokenizer. Raises `ValueError` as `segments` does, and for what is no tokens.
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
    exchanges = itertools.zip_longest(turns[::2], answers, fillvalue=())
    return _prompted(tokenizer, Chat(system, tuple(Exchange(question, (), answer) for question, answer in exchanges)))


def _prompted(tokenizer: Tokenizer, chat: Chat) -> Chat:
    """The conversation with the prompts of its questions, which do not depend on what was answered."""
    turns = [text for exchange in chat.exchanges for text in (exchange.question, "a")]
    prompts = [tuple(ids) for ids, is_answer in segments(tokenizer, dialog_with(chat.system, turns[:-1]))
               if not is_answer]
    return chat._replace(exchanges=tuple(exchange._replace(prompt=prompt) for exchange, prompt in
                                         zip(chat.exchanges, prompts, strict=True)))


def _closed(end: tuple[int, ...], exchange: Exchange) -> Exchange:
    """The exchange with the end of its answer, of which the model may have written a part."""
    answer = exchange.answer
    if answer[-1:] == end[-1:]:
        return exchange
    there = next(n for n in range(len(end), -1, -1) if answer[len(answer) - n:] == end[:n])
    return exchange._replace(answer=(*answer, *end[there:]))
