"""Conversations: their tokens are Meta's, their cache goes on and never matters, and an old one stays what it was."""

import functools
import itertools

import pytest
import torch
from dialogs import (
    answers,
    copied,
    dialog,
    drawn,
    meta_ids,
    own_tokens,
    plays,
    questions,
    said,
    same,
    say,
    systems,
    talker,
    text,
    told,
    turns,
)
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import keys

import llama_fn as lf
from llama_fn.generation import decode
from llama_fn.generation import state as rows_state
from llama_fn.generation.conversation import ContextFull, drop, unanswered

exchanges = st.lists(st.tuples(questions, answers), min_size=1, max_size=2)


@pytest.fixture(scope="module")
def chatty(tokenizer) -> lf.Model:
    return talker(tokenizer)


@given(systems, turns, questions)
def test_tokens_are_metas_where_the_answers_are_the_tokenizers_own(chatty, system, turns, question):
    chat = lf.ask(chatty, told(chatty, system, turns), question)
    assert chat.tokens == meta_ids(chatty.tokenizer, dialog(system, turns, question))


def test_a_space_that_the_model_drew_before_the_end_is_metas(chatty):
    space, = chatty.tokenizer.encode(" ", bos=False)[:1]
    answer = own_tokens(chatty.tokenizer, "a fox")
    assert say(chatty, lf.Chat(), "Who?", [*answer, space]).tokens == say(chatty, lf.Chat(), "Who?", answer).tokens


@given(keys(), systems, exchanges)
def test_the_cache_that_goes_on_is_that_of_all_tokens(chatty, key, system, turns):
    chat = told(chatty, system, turns)
    for asked in (lf.ask(chatty, chat, "and then?"), lf.ask(chatty, drawn(chatty, unanswered(chat), key), "and?")):
        state = rows_state.resume(chatty.params, asked.tokens, asked.cache, len(asked.tokens))
        logits, _ = lf.forward(chatty.params, torch.tensor(asked.tokens))
        assert (state.logits[0] - logits[-1]).abs().max() < 1e-9
        assert said(drawn(chatty, asked, key)) == said(drawn(chatty, asked._replace(cache=None), key))


@given(keys(), st.lists(st.sampled_from([None, 0, 1, 5]), min_size=2, max_size=4))
@example(key=lf.random.key(0), limits=[0, None, 1])
def test_an_answer_may_be_longer_or_shorter_than_the_cache_has_room_for(chatty, key, limits):
    def answered(asked, limit) -> lf.Chat:
        some = itertools.islice(lf.answer(chatty, asked, key=key, max_new_tokens=limit), 4)
        return list(some)[-1][1]

    chat = bare = lf.Chat()
    for limit in limits:
        chat = answered(lf.ask(chatty, chat, "Who?"), limit)
        bare = answered(lf.ask(chatty, bare, "Who?")._replace(cache=None), limit)
    assert said(chat) == said(bare)


@given(keys(), st.integers(1, 6))
def test_only_new_tokens_go_through_the_model(chatty, key, count):
    chat, passed = lf.Chat("Be brief."), []

    def counting(f):
        return lambda params, tokens, cache, **own: passed.append(tokens.shape[-1]) or f(params, tokens, cache, **own)

    for question in ("Who was the fox?", "and the boy?", ""):
        asked = lf.ask(chatty, chat, question)
        passed.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows_state, "trunk", counting(lf.trunk))  # the prompt
            patch.setattr(decode, "step_for", lambda *_: functools.partial(decode.step, run=counting(lf.forward)))
            chat = drawn(chatty, asked, key, count)
        new = len(asked.exchanges[-1].prompt)
        closing = 3 if len(asked.exchanges) > 1 else 0  # the last token drawn, a space and the end
        assert new <= passed[0] <= new + closing and set(passed[1:]) <= {1} and len(passed) <= count + 1


@pytest.mark.slow
@given(keys(), st.permutations(["and the boy?", "why?", "/INST"]))
def test_an_old_conversation_goes_on_otherwise(chatty, key, others):
    # Stopped long before its end, it has a cache with room for all that follows.
    chat = list(itertools.islice(lf.answer(chatty, lf.ask(chatty, lf.Chat(), "Who was the fox?"), key=key), 6))[-1][1]
    before = copied(chat)
    alone = {question: drawn(chatty, lf.ask(chatty, before, question), key) for question in sorted(others)}
    for question in others:
        assert same(drawn(chatty, lf.ask(chatty, chat, question), key), alone[question])
    assert same(chat, before)


@given(keys(), st.integers(0, 20))
def test_pieces_join_to_the_answer_and_each_knows_the_conversation_so_far(chatty, key, count):
    asked = lf.ask(chatty, lf.Chat(), "Who?")
    pieces = list(lf.answer(chatty, asked, key=key, max_new_tokens=count))
    answers = [so_far.exchanges[-1].answer for _, so_far in pieces]
    assert "".join(piece for piece, _ in pieces).rstrip(" ") == text(chatty, pieces[-1][1])
    assert all(longer[:len(shorter)] == shorter for shorter, longer in itertools.pairwise(answers))
    assert pieces[-1][0] == "" and all(piece for piece, _ in pieces[:-1])


@pytest.mark.slow
@given(keys(), answers, st.integers(0, 6))
def test_a_stopped_answer_is_gone_on_with(chatty, key, answer, stop):
    asked, answer = lf.ask(chatty, lf.Chat(), "Who?"), f"It {answer} is."
    script = own_tokens(chatty.tokenizer, answer)
    sample = plays(script, len(asked.tokens))
    pieces = list(itertools.islice(lf.answer(chatty, asked, key=key, max_new_tokens=99, sampler=sample), stop))
    stopped = pieces[-1][1] if pieces else asked
    if stopped.tokens[-1] != chatty.tokenizer.eos_id:
        rest = list(lf.answer(chatty, stopped, key=key, max_new_tokens=99, sampler=sample))
        assert said(rest[-1][1]) == said(say(chatty, lf.Chat(), "Who?", script))
        assert "".join(piece for piece, _ in pieces + rest) == answer
    assert said(drawn(chatty, lf.ask(chatty, stopped, "and?"), key)) == said(
        drawn(chatty, lf.ask(chatty, stopped, "and?")._replace(cache=None), key))


def test_an_answer_ends_with_the_models_end_or_at_its_limit(chatty):
    asked, eos, key = lf.ask(chatty, lf.Chat(), "Who?"), chatty.tokenizer.eos_id, lf.random.key(0)
    script = own_tokens(chatty.tokenizer, "a fox")
    sample = plays(script, len(asked.tokens))
    *_, (_, ended) = lf.answer(chatty, asked, key=key, max_new_tokens=len(script) + 1, sampler=sample)
    assert ended.exchanges[0].answer[-1] == eos and ended.exchanges[0].answer[:len(script)] == tuple(script)
    *_, (_, limited) = lf.answer(chatty, asked, key=key, max_new_tokens=len(script), sampler=sample)
    assert limited.exchanges[0].answer == tuple(script)
    *_, (piece, more) = lf.answer(chatty, limited, key=key, sampler=sample)
    assert said(more) == said(ended) and piece == ""
    assert lf.ask(chatty, limited, "and?").tokens == lf.ask(chatty, ended, "and?").tokens
    for nothing in (ended, lf.Chat(), lf.Chat("Be brief.")):
        with pytest.raises(ValueError, match="there is nothing to answer: ask first"):
            lf.answer(chatty, nothing, key=key)


def test_a_full_context_is_told_in_numbers(tokenizer):
    small = talker(tokenizer, 64)
    chat = say(small, lf.Chat(), "Who?", own_tokens(tokenizer, "Felix was the fox."))
    there, new = len(chat.tokens), len(lf.ask(small, lf.Chat(), "and then? " * 6).tokens)
    with pytest.raises(ContextFull, match=f"the context of 64 tokens is full: the conversation has {there} tokens and "
                                          f"this message {new}, which leaves no room for an answer"):
        lf.ask(small, chat, "and then? " * 6)
    room = 64 - len(lf.ask(small, chat, "").tokens)
    exact = "1" * room  # a digit is a token
    with pytest.raises(ContextFull):
        lf.ask(small, chat, exact)
    asked = lf.ask(small, chat, exact[1:])
    *_, (_, full) = lf.answer(small, asked, key=lf.random.key(0), sampler=plays([70] * 9, 63))
    assert len(full.tokens) == 64 and full.exchanges[-1].answer == (70,)
    with pytest.raises(ContextFull, match="the context of 64 tokens is full: the conversation has 64 tokens$"):
        lf.answer(small, full, key=lf.random.key(0))
    with pytest.raises(ContextFull, match="is full: the conversation has 66 tokens and this message"):
        lf.ask(small, full, "")
    assert len(lf.ask(small, drop(small, full, 2), "").tokens) < 64


def test_bad_requests_are_refused_at_once(chatty):
    asked = lf.ask(chatty, lf.Chat(), "Who?")
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        lf.answer(chatty, asked, key=lf.random.key(0), max_new_tokens=-1)
    with pytest.raises(ValueError, match=r"the text is not valid Unicode: .* U\+D800"):
        lf.ask(chatty, lf.Chat(), "\ud800")
