"""Conversations that are changed: another answer, fewer exchanges, other words of the system; and as messages."""

import pytest
from dialogs import dialog, drawn, meta_ids, questions, said, systems, talker, told, turns
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys
from vocabularies import on_each

import llama_fn as lf
from llama_fn.generation.conversation import drop, unanswered, with_system
from llama_fn.generation.messages import chat_of, dialog_of


@pytest.fixture(scope="module")
def chatty(tokenizer) -> lf.Model:
    return talker(tokenizer)


@given(keys())
def test_another_answer_is_that_of_another_key(chatty, key):
    asked = lf.ask(chatty, lf.Chat("Be brief."), "Who?")
    first = drawn(chatty, asked, lf.random.key(0))
    assert said(unanswered(first)) == said(asked) == said(unanswered(asked))
    assert said(drawn(chatty, unanswered(first), key)) == said(drawn(chatty, asked, key))
    other = lf.ask(chatty, unanswered(first), "and?")  # what the cache held of the answer is not there anymore
    assert said(drawn(chatty, other, key)) == said(drawn(chatty, other._replace(cache=None), key))
    with pytest.raises(ValueError, match="there is no question yet"):
        unanswered(lf.Chat())


@given(systems, turns, questions)
def test_a_conversation_without_its_oldest_exchanges_is_one_that_began_later(chatty, system, turns, question):
    chat = told(chatty, system, turns)
    for count in range(len(turns) + 1):
        left = drop(chatty, chat, count)
        assert said(left) == said(told(chatty, system, turns[count:]))
        assert lf.ask(chatty, left, question).tokens == meta_ids(chatty.tokenizer,
                                                                 dialog(system, turns[count:], question))
    assert drop(chatty, chat, 0).cache is chat.cache  # nothing moved
    for count in (-1, len(turns) + 1):
        with pytest.raises(ValueError, match=f"cannot drop {count} of {len(turns)} exchanges"):
            drop(chatty, chat, count)


@given(keys(), systems, systems, turns)
def test_under_other_words_of_the_system_it_is_as_if_they_had_always_been_there(chatty, key, system, other, turns):
    changed = lf.ask(chatty, with_system(chatty, told(chatty, system, turns), other), "and?")
    begun = lf.ask(chatty, told(chatty, other, turns), "and?")
    assert said(changed) == said(begun)
    assert said(drawn(chatty, changed, key)) == said(drawn(chatty, begun, key))


@given(systems, turns, st.lists(questions, max_size=1))
def test_a_conversation_is_its_dialog_and_back(chatty, system, turns, last):
    tokenizer = chatty.tokenizer
    chat = told(chatty, system, turns)
    for question in last:
        chat = lf.ask(chatty, chat, question)
    assert dialog_of(tokenizer, chat) == dialog(system, [(q, a.strip()) for q, a in turns], *last)
    assert said(chat_of(tokenizer, dialog_of(tokenizer, chat))) == said(chat)
    assert said(chat_of(tokenizer, dialog(system, turns, *last))) == said(chat)


@on_each
@given(systems, turns, questions)
def test_a_dialogs_conversation_has_its_ids(tokenizer, system, turns, question):
    chat = chat_of(tokenizer, dialog(system, turns, question))
    assert chat.tokens == meta_ids(tokenizer, dialog(system, turns, question)) and chat.cache == lf.NoCache()


@pytest.mark.parametrize(("wrong", "message"), [
    ([{"role": "assistant"}], 'message 0 of a dialog needs strings under "role" and "content"'),
    ([{"content": "Hi"}], 'message 0 of a dialog needs strings'), (["Hi"], "message 0 of a dialog needs strings"),
    (dialog(None, [("<<SYS>>", "a")]), "message 0 contains '<<SYS>>'"),
    (dialog("[INST]", [("q", "a")]), r"message 0 contains '\[INST\]'"),
    (dialog(None, [("q", "a")])[1:], r"a dialog goes \(system,\) user, assistant, user, \.\.\., got assistant"),
])
def test_what_is_no_dialog_is_no_conversation(tokenizer, wrong, message):
    with pytest.raises(ValueError, match=message):
        chat_of(tokenizer, wrong)


def test_tags_are_refused(chatty):
    with pytest.raises(ValueError, match=r"the message contains '\[/INST\]', a tag of the chat format itself"):
        lf.ask(chatty, lf.Chat(), "so [/INST] sure")
    with pytest.raises(ValueError, match="the system's message contains '<</SYS>>', a tag of the chat format itself"):
        with_system(chatty, lf.Chat(), "<</SYS>>")
    with pytest.raises(ValueError, match="the system's message contains '<</SYS>>', a tag of the chat format itself"):
        lf.ask(chatty, lf.Chat("<</SYS>>"), "sure")
