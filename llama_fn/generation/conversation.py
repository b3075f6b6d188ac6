"""A conversation as a value: what was said, as tokens, and a cache of them that goes on from turn to turn."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.generation import decode
from llama_fn.generation.chat import Message, check_tags, request, split_dialog
from llama_fn.generation.completion import room
from llama_fn.generation.sampling import Sampler
from llama_fn.generation.sampling import sampler as make_sampler
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
        """All tokens so far: Meta's for the same dialog, wherever the answers' tokens are the tokenizer's own."""
        return [id for exchange in self.exchanges for id in (*exchange.prompt, *exchange.answer)]


class ContextFull(ValueError):
    """A conversation is longer than the model's context."""


@typed
def ask(model: Model, chat: Chat, question: str) -> Chat:
    """The conversation with a question more, for `answer` to go on with.

    Raises `ContextFull` if nothing could be answered, and `ValueError` for a tag of the format in the question or in
    the system's words.
    """
    check_tokenizer(model)
    check_tags(chat.system or "", "the system's message")
    check_tags(question, "the message")
    exchanges = tuple(_closed(model.tokenizer, exchange) for exchange in chat.exchanges)
    prompt = model.tokenizer.encode(request(question, None if exchanges else chat.system))
    asked = chat._replace(exchanges=(*exchanges, Exchange(question, tuple(prompt), ())))
    count, context = len(asked.tokens), model.params.config.max_seq_len
    if count >= context:
        raise ContextFull(f"the context of {context} tokens is full: the conversation has "
                          f"{count - len(prompt)}, this message {len(prompt)}, and an answer needs some")
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
    if not tokens or tokens[-1] == model.tokenizer.eos_id:
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
        for step in decode.steps(model.params, state, keys, sample, (model.tokenizer.eos_id,), [limit],
                                 run=decode.fast(model.params, 1, sample)):
            drawn.append(step.token)
            so_far = last._replace(answer=(*last.answer, *drawn))
            latest = chat._replace(exchanges=(*before, so_far), cache=step.state.cache)
            yield step.token

    def pieces() -> Iterator[tuple[str, Chat]]:
        for piece in model.tokenizer.decode_stream(itertools.chain(last.answer, ids())):
            if drawn:  # what comes before is told already
                yield piece, latest
        ended = latest.exchanges[-1] if len(drawn) == limit else _closed(model.tokenizer, latest.exchanges[-1])
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
    kept = chat.exchanges[count:]
    if kept and count and chat.system is not None:
        prompt = model.tokenizer.encode(request(kept[0].question, chat.system))
        kept = (kept[0]._replace(prompt=tuple(prompt)), *kept[1:])
    return chat._replace(exchanges=kept, cache=chat.cache if count == 0 else NoCache())


def with_system(model: Model, chat: Chat, system: str | None) -> Chat:
    """The conversation as it would stand under other words of the system."""
    check_tokenizer(model)
    check_tags(system or "", "the system's message")
    exchanges = chat.exchanges
    if exchanges:
        prompt = model.tokenizer.encode(request(exchanges[0].question, system))
        exchanges = (exchanges[0]._replace(prompt=tuple(prompt)), *exchanges[1:])
    return Chat(system, exchanges)


def dialog_of(tokenizer: Tokenizer, chat: Chat) -> list[Message]:
    """The conversation as messages, as `chat_completion` takes them (with a question as the last)."""
    messages: list[Message] = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    for exchange in chat.exchanges:
        messages.append({"role": "user", "content": exchange.question})
        if exchange.answer:
            messages.append({"role": "assistant", "content": tokenizer.decode(exchange.answer).strip()})
    return messages


def chat_of(tokenizer: Tokenizer, dialog: Sequence[Message]) -> Chat:
    """The inverse of `dialog_of`: answers get the tokenizer's own tokens. The assistant may have the last word.

    Raises `ValueError` as `chat_completion` does for a dialog in another order, and for a tag of the format.
    """
    system, turns = split_dialog(dialog, open=False)
    exchanges = []
    for i in range(0, len(turns), 2):
        question = request(turns[i], system if i == 0 else None)
        prompt = tokenizer.encode(question)
        whole = tokenizer.encode(f"{question} {turns[i + 1].strip()} ", eos=True) if i + 1 < len(turns) else prompt
        exchanges.append(Exchange(turns[i], tuple(whole[:len(prompt)]), tuple(whole[len(prompt):])))
    return Chat(system, tuple(exchanges))


def _closed(tokenizer: Tokenizer, exchange: Exchange) -> Exchange:
    """The exchange with the end of its answer: Meta puts a space before the end token, and so may the model. (Not every
    vocabulary has a space alone: then there is none.)
    """
    space, end = tokenizer.processor.piece_to_id("\u2581"), tokenizer.eos_id
    if exchange.answer[-1:] == (end,):
        return exchange
    spaces = [space] * (exchange.answer[-1:] != (space,) and not tokenizer.processor.is_unknown(space))
    return exchange._replace(answer=(*exchange.answer, *spaces, end))
