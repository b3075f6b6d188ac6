"""Chat templates: the tokens of transformers, safe from what a user writes and from what a stranger's template does."""

import dataclasses
import json
import sys
import time
import tracemalloc

import pytest
import torch
from dialogs import answers, dialog, dialogs, questions, said, systems, talker, turns
from hypothesis import given
from hypothesis import strategies as st
from templates import BARE, CHATML, HOSTILE, LLAMA2, NO_SPACES, ONE_BEGIN, VICUNA, ZEPHYR
from transformers import AutoTokenizer

import llama_fn as lf
from llama_fn.generation import template
from llama_fn.generation.chat import by_meta, closing, dialog_ids, segments
from llama_fn.generation.conversation import drop, with_system
from llama_fn.generation.messages import chat_of, dialog_of

ADDED = ((401, "<|im_start|>"), (402, "<|im_end|>"))
HELLO = dialog(None, [], "hello")


@pytest.fixture(scope="module")
def talkers(tokenizer) -> dict[str, lf.Model]:
    """A model for each template. (The weights have rows for tokens that are not added, too.)"""
    model, more = talker(tokenizer), {
        "added": ADDED, "special": (401, 402), "end_ids": (402,), "token_names": (("eos_token", "<|im_end|>"),)}
    params = talker(tokenizer, extra=len(ADDED)).params
    return {name: lf.Model(params if name == "chatml" else model.params, dataclasses.replace(
        tokenizer, chat_template=text, **(more if name == "chatml" else {})))
        for name, text in (("zephyr", ZEPHYR), ("vicuna", VICUNA), ("chatml", CHATML), ("bare", BARE))}


@pytest.fixture(scope="module")
def theirs(talkers, tmp_path_factory) -> dict[str, AutoTokenizer]:
    """transformers' tokenizers of the same files."""
    read = {}
    for name, model in talkers.items():
        folder = tmp_path_factory.mktemp(name)
        plain = dataclasses.replace(model.tokenizer, added=(), special=(), end_ids=(), token_names=())
        lf.save(lf.Model(lf.tree.map(torch.Tensor.float, talker(plain).params), plain), folder, format="hf")
        read[name] = AutoTokenizer.from_pretrained(folder)
        read[name].add_special_tokens({"additional_special_tokens": [text for _, text in model.tokenizer.added]})
        assert all(read[name].convert_tokens_to_ids(text) == id for id, text in model.tokenizer.added)
    return read


def their_ids(tokenizer: AutoTokenizer, dialog: list[lf.Message]) -> list[int]:
    return tokenizer.apply_chat_template(dialog, add_generation_prompt=dialog[-1]["role"] == "user", return_dict=False)


each = pytest.mark.parametrize("name", ["zephyr", "vicuna", "chatml", "bare"])


def test_a_question_that_ends_with_the_end_token_is_answered(tokenizer):
    text = "{% for m in messages %}{{ m.role ~ m.content ~ eos_token }}{% endfor %}"  # it does not lead up to an answer
    model = talker(tokenizer)._replace(tokenizer=dataclasses.replace(tokenizer, chat_template=text))
    chat = lf.ask(model, lf.Chat(), "hello")
    assert chat.tokens == dialog_ids(model.tokenizer, HELLO) and chat.tokens[-1] == tokenizer.eos_id
    greedy, key = lf.sampler(temperature=0), lf.random.key(0)
    *_, (_, answered) = lf.answer(model, chat, key=key, max_new_tokens=3, sampler=greedy)
    expected, = lf.chat_completion(model, [HELLO], key=key, max_new_tokens=3, sampler=greedy)
    assert list(answered.exchanges[-1].answer)[:len(expected.tokens)] == expected.tokens != []


@each
@given(dialogs)
def test_tokens_are_those_of_transformers(talkers, theirs, name, dialog):
    assert dialog_ids(talkers[name].tokenizer, dialog) == their_ids(theirs[name], dialog)


@each
@given(systems, turns, st.lists(questions, max_size=1))
def test_segments_join_to_the_dialog_and_tell_whose_they_are(talkers, theirs, name, system, turns, last):
    told, tokenizer = dialog(system, turns, *last), talkers[name].tokenizer
    if turns or last:
        pieces = segments(tokenizer, told)
        assert [id for ids, _ in pieces for id in ids] == their_ids(theirs[name], told)
        spoken = [ids for ids, is_answer in pieces if is_answer]
        assert [tokenizer.decode(ids).strip() for ids in spoken] == [answer.strip() for _, answer in turns]
        end = {"zephyr": [2], "vicuna": [2], "chatml": [402], "bare": []}[name]
        assert all(ids[len(ids) - len(end):] == end for ids in spoken) and closing(tokenizer) == tuple(end)


@each
@given(systems, turns, questions)
def test_a_conversation_has_the_tokens_of_its_dialog(talkers, theirs, name, system, turns, question):
    model, turns = talkers[name], [(question, answer.strip()) for question, answer in turns]
    told = dialog(system, turns, question)
    expected = their_ids(theirs[name], told)
    assert chat_of(model.tokenizer, told).tokens == expected
    before = chat_of(model.tokenizer, told[:-1])
    assert lf.ask(model, before, question).tokens == expected
    assert with_system(model, lf.ask(model, before._replace(system="x"), question), system).tokens == expected
    for count in range(len(turns) + 1):
        later = dialog(system, turns[count:], question)
        assert drop(model, chat_of(model.tokenizer, told), count).tokens == their_ids(theirs[name], later)


@each
def test_a_conversation_goes_on_from_its_cache_as_without_one(talkers, name):
    model, key, chat = talkers[name], lf.random.key(3), lf.Chat("Be brief.")
    for question in ("Who was it?", "and the boy?", "why?"):
        asked = lf.ask(model, chat, question)
        *_, (_, chat) = lf.answer(model, asked, key=key, max_new_tokens=7)
        *_, (_, bare) = lf.answer(model, asked._replace(cache=None), key=key, max_new_tokens=7)
        assert said(chat) == said(bare)


NAMES = ["</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "<", "/s>", "s>", "|", "im_end", "a", " ", "\n",
         "\U000f0000", "\U000f0001"]


@each
@given(st.lists(st.sampled_from(NAMES)).map("".join), st.lists(st.sampled_from(NAMES)).map("".join))
def test_names_of_special_tokens_in_what_is_said_are_plain_text(talkers, name, question, answer):
    tokenizer = talkers[name].tokenizer
    told = dialog(question, [(question, f"x{answer}")], question)
    special = {0, 1, 2, *(id for id, _ in tokenizer.added)}
    ids, plain = dialog_ids(tokenizer, told), dialog_ids(tokenizer, dialog("x", [("x", "x")], "x"))
    assert [id for id in ids if id in special] == [id for id in plain if id in special]
    assert [id for ids, _ in segments(tokenizer, told) for id in ids] == ids
    assert answer.strip() in tokenizer.decode(ids) and "\u2047" not in tokenizer.decode(ids)


def test_names_that_overlap_are_all_plain_text(tokenizer):
    names = ((401, "<|a|>"), (402, "|>b|"))
    told = dataclasses.replace(tokenizer, chat_template=ZEPHYR, added=names, special=(401, 402))
    assert not {401, 402} & {*dialog_ids(told, dialog(None, [], "<|a|>b|"))}


drawn_answers = st.one_of(st.lists(st.integers(0, 400), max_size=5), answers, st.sampled_from(
    ["[INST]", "a [/INST] b", "<</SYS>>", "</s>"]))


@given(st.sampled_from(["zephyr", "vicuna", "chatml", "bare", None]), systems,
       st.lists(st.tuples(questions, drawn_answers), max_size=3))
def test_what_is_saved_is_opened_again(talkers, tokenizer, name, system, turns):
    """Whatever the model drew: tags, halves of characters, nothing."""
    model = talkers[name] if name else talker(tokenizer)
    chat = lf.Chat(system)
    for question, answer in turns:
        ids = answer if isinstance(answer, list) else model.tokenizer.encode(answer, bos=False)
        *before, last = lf.ask(model, chat, question).exchanges
        chat = lf.Chat(system, (*before, last._replace(answer=tuple(ids))))
    again = chat_of(model.tokenizer, json.loads(json.dumps(dialog_of(model.tokenizer, chat))))
    assert said(again) == said(chat)


def test_tokens_that_do_not_spell_the_content_give_way_to_it(tokenizer):
    told = dialog(None, [("Who?", "a fox")], "and?")
    for stale in ([70, 71], [0, 9999], [-1]):
        edited = [told[0], told[1] | {"tokens": stale}, told[2]]
        assert chat_of(tokenizer, edited) == chat_of(tokenizer, told)
    for wrong in ("x", 3, [True], [1.0], None):
        with pytest.raises(ValueError, match='the "tokens" of answer 0 must be a list of token ids'):
            chat_of(tokenizer, [told[0], told[1] | {"tokens": wrong}])


def test_llama_2s_template_is_recognized_by_its_tokens(tokenizer):
    def follows(text: str | None, legacy: bool = True) -> bool:
        return by_meta(dataclasses.replace(tokenizer, chat_template=text, legacy=legacy))

    published = LLAMA2.replace("' [INST] '", "'[INST] '")  # for tokenizers that put a space after the begin token
    for legacy in (True, False):  # which of the two a folder's tokenizer is said to be does not matter
        assert [follows(text, legacy) for text in (None, "", LLAMA2, published)] == [True] * 4
    for text in (NO_SPACES, ONE_BEGIN, ZEPHYR, VICUNA, "[INST] <<SYS>> <</SYS>> [/INST] {% if"):
        assert not follows(text)
    with pytest.raises(ValueError, match=r"message 0 contains '\[INST\]'"):
        dialog_ids(dataclasses.replace(tokenizer, chat_template=LLAMA2), dialog(None, [], "[INST]"))


def test_without_jinja2_a_template_is_refused_and_llama_2s_is_not(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "llama_fn.generation.sandbox", raising=False)
    monkeypatch.delattr("llama_fn.generation.sandbox", raising=False)
    assert dialog_ids(dataclasses.replace(tokenizer, chat_template=LLAMA2), HELLO) == dialog_ids(tokenizer, HELLO)
    with pytest.raises(ValueError, match="jinja2, which renders it, is not installed: pip install"):
        dialog_ids(dataclasses.replace(tokenizer, chat_template=ZEPHYR), HELLO)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:60])
def test_a_hostile_template_is_one_error_and_soon(tokenizer, text):
    begun = time.monotonic()
    with pytest.raises(ValueError, match="the chat template ") as raised:
        dialog_ids(dataclasses.replace(tokenizer, chat_template=text), HELLO)
    assert time.monotonic() - begun < 60 and "\n" not in str(raised.value)  # 5 s are the worst seen


@pytest.mark.parametrize("text", [
    "'{:300000000d}'.format(1)", "'a' * 300000000", "'a'.center(300000000)", "'%300000000d' % 1", "3 ** 300000000",
    "'a' | center(300000000)", "'{:300000000d}'.format_map({})"])
def test_no_single_step_makes_much_of_little(tokenizer, text):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="the chat template "):
            dialog_ids(dataclasses.replace(tokenizer, chat_template=f"{{{{ {text} }}}}"), HELLO)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("shown", "text"), [
    ("m.content[1:-1]", "hat fo"), ("m.content if loop.first", "what?"),
    ("m.content + m.content", "what?what?a foxa fox")])
def test_a_template_that_changes_answers_has_tokens_and_no_segments(tokenizer, shown, text):
    odd = dataclasses.replace(tokenizer, chat_template="{% for m in messages %}{{ " + shown + " }}{% endfor %}")
    told = dialog(None, [("what?", "a fox")])
    assert template.tokens(odd, told) == tokenizer.encode(text, bos=False)
    with pytest.raises(ValueError, match="the chat template changes the text of an answer"):
        segments(odd, told)


def test_a_template_may_refuse_a_dialog(tokenizer):
    strict = dataclasses.replace(tokenizer, chat_template="{{ raise_exception('no system, please') }}")
    with pytest.raises(ValueError, match="dialog 0: the chat template cannot be rendered: no system, please"):
        lf.chat_completion(lf.Model(talker(tokenizer).params, strict), [HELLO], key=lf.random.key(0))
