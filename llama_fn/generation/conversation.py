"""A conversation as a value: the tokens of all messages, and a cache that each turn continues."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation import decode
from llama_fn.generation.chat import check_messages, closing, dialog_with, segments
from llama_fn.generation.completion import token_limit
from llama_fn.generation.sampling import Sampler
from llama_fn.generation.sampling import sampler as make_sampler
from llama_fn.generation.state import resume
from llama_fn.generation.template import common
from llama_fn.model.cache import Cache, NoCache
from llama_fn.shapes import typed
from llama_fn.tokenizer import Tokenizer


class Exchange(NamedTuple):
    """A question as the user wrote it, its tokens in the chat format, and the tokens of the answer so far."""

    question: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Chat(NamedTuple):
    """A conversation: the system message, the exchanges, and a cache of the first of their tokens.

    It is a value: an old conversation can be continued again, in another way. Answers keep the tokens that were drawn.
    `ask` and `answer` return conversations. ``lf.Chat(system="Be brief.")`` is a new one.

    >>> chat = lf.Chat(system="Answer in one word.")
    """

    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()
    cache: Cache | NoCache | None = NoCache()

    @property
    def tokens(self) -> list[int]:
        """All tokens so far. Those of an answer may differ from those that the tokenizer gives for its text."""
        return [id for exchange in self.exchanges for id in (*exchange.prompt, *exchange.answer)]


class ContextFull(ValueError):
    """The conversation leaves no room in the model's context for an answer."""


@typed
def ask(model: Model, chat: Chat, question: str) -> Chat:
    """The conversation with one more question, which `answer` then answers.

    Raises `ValueError` if the context has no room for an answer, and for a tag of the chat format in the question or in
    the system message. The first of them is a ``ContextFull``.

    >>> chat = lf.ask(model, lf.Chat(), "Who?")
    """
    check_tokenizer(model)
    check_messages(model.tokenizer, chat.system, question)
    end = closing(model.tokenizer)
    exchanges = (*(_closed(end, exchange) for exchange in chat.exchanges), Exchange(question, (), ()))
    asked = prompted(model.tokenizer, chat._replace(exchanges=exchanges))
    # A chat template may write earlier messages in another way once a question follows. The cache keeps only tokens
    # that are still the same.
    asked = asked._replace(cache=_shortened(chat.cache, common(chat.tokens, asked.tokens)))
    count, context = len(asked.tokens), model.params.config.max_seq_len
    new = len(asked.exchanges[-1].prompt)
    if count >= context:
        raise ContextFull(f"the context of {context} tokens is full: the conversation has {count - new} tokens and "
                          f"this message {new}, which leaves no room for an answer")
    return asked


@typed
def answer(model: Model, chat: Chat, *, key: Int[Tensor, "2"], max_new_tokens: int | None = None,
           sampler: Sampler | None = None) -> Iterator[tuple[str, Chat]]:
    """The answer to the last question, in pieces as it is written, each with the conversation up to it.

    The last piece is the empty string. Only tokens that the cache does not hold yet go through the model. The answer
    ends at the model's end token, after `max_new_tokens` tokens, or at the end of the context. Unless it ended at the
    end token, a second call of `answer` continues it. `key` and `sampler` mean the same as in `text_completion`.

    Raises `ValueError`, when it is called, if the context is full and if there is no question to answer.

    >>> for piece, chat in lf.answer(model, lf.ask(model, lf.Chat(), "Who?"), key=key, max_new_tokens=8):
    ...     print(piece, end="")
    """
    check_tokenizer(model)
    tokens, latest, context = chat.tokens, chat, model.params.config.max_seq_len
    end = closing(model.tokenizer)
    complete = ((model.tokenizer.eos_id,), end[-1:] or None)  # how a complete answer ends
    if not tokens or chat.exchanges[-1].answer[-1:] in complete:
        raise ValueError("there is nothing to answer: ask first")
    if len(tokens) >= context:
        raise ContextFull(f"the context of {context} tokens is full: the conversation has {len(tokens)} tokens")
    limit = token_limit(model.params, len(tokens), max_new_tokens)
    *before, last = chat.exchanges
    drawn: list[int] = []

    def ids() -> Iterator[int]:
        nonlocal latest
        state = resume(model.params, tokens, chat.cache, len(tokens) + limit)
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
            if drawn:  # an earlier call has returned the pieces before the first drawn token
                yield piece, latest
        ended = latest.exchanges[-1] if len(drawn) == limit else _closed(end, latest.exchanges[-1])
        yield "", latest._replace(exchanges=(*before, ended))

    return pieces()


def unanswered(chat: Chat) -> Chat:
    """The conversation without its last answer, so that `answer` gives another one.

    Raises `ValueError` for a conversation without a question.
    """
    if not chat.exchanges:
        raise ValueError("there is no question yet")
    *before, last = chat.exchanges
    asked = chat._replace(exchanges=(*before, last._replace(answer=())))
    return asked._replace(cache=_shortened(chat.cache, len(asked.tokens)))


def drop(model: Model, chat: Chat, count: int) -> Chat:
    """The conversation without its `count` oldest exchanges.

    The system message moves to the first exchange that remains. All positions change, so the whole conversation goes
    through the model again. Raises `ValueError` for a `count` below 0 or above the number of exchanges.
    """
    check_tokenizer(model)
    if not 0 <= count <= len(chat.exchanges):
        raise ValueError(f"cannot drop {count} of {len(chat.exchanges)} exchanges")
    return chat if count == 0 else prompted(model.tokenizer, Chat(chat.system, chat.exchanges[count:]))


def with_system(model: Model, chat: Chat, system: str | None) -> Chat:
    """The conversation with another system message. Raises `ValueError` for a tag of the chat format in it."""
    check_tokenizer(model)
    check_messages(model.tokenizer, system, "")
    prompted(model.tokenizer, Chat(system, (Exchange("", (), ()),)))  # a template may refuse any system message
    return prompted(model.tokenizer, Chat(system, chat.exchanges))


def prompted(tokenizer: Tokenizer, chat: Chat) -> Chat:
    """The conversation with the tokens of its questions, which do not depend on the answers."""
    turns = [text for exchange in chat.exchanges for text in (exchange.question, "a")]
    prompts = [tuple(ids) for ids, is_answer in segments(tokenizer, dialog_with(chat.system, turns[:-1]))
               if not is_answer]
    return chat._replace(exchanges=tuple(exchange._replace(prompt=prompt) for exchange, prompt in
                                         zip(chat.exchanges, prompts, strict=True)))


def _closed(end: tuple[int, ...], exchange: Exchange) -> Exchange:
    """The exchange with its answer ended by the tokens `end`, of which the model may have drawn the first ones."""
    answer = exchange.answer
    if answer[-1:] == end[-1:]:
        return exchange
    count = next(n for n in range(len(end), -1, -1) if answer[len(answer) - n:] == end[:n])
    return exchange._replace(answer=(*answer, *end[count:]))


def _shortened(cache: Cache | NoCache | None, length: int) -> Cache | NoCache | None:
    """The cache with at most `length` tokens in it."""
    if not isinstance(cache, Cache) or int(cache.length) <= length:
        return cache
    return cache._replace(length=cache.length.clamp(max=length))
