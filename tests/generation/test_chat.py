"""Chat: a dialog's tokens are Meta's, its answer is a completion of them, and what is no dialog is refused."""

import math
import re

import pytest
import torch
from dialogs import dialog, dialogs, meta_ids, talker
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys
from vocabularies import TOKENIZERS, on_each

import llama_fn as lf
from llama_fn.generation.chat import dialog_ids, split_dialog

TAGS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
HELLO = [{"role": "user", "content": "hello"}]
DIALOGS = [HELLO, dialog("Be brief.", [("Who was the fox?", "Felix")], "and the boy?"), dialog(None, [], "")]


@pytest.fixture(scope="module")
def chatty(tokenizer) -> lf.Model:
    return talker(tokenizer, 256)


@on_each
@given(dialogs)
def test_ids_are_those_of_metas_rules(tokenizer, dialog):
    assert dialog_ids(tokenizer, dialog) == meta_ids(tokenizer, dialog)


@pytest.mark.skipif("llama2" not in TOKENIZERS, reason="Meta's license keeps its tokenizer out of the repository")
def test_ids_of_the_released_tokenizer():
    told = dialog("You are assistant.", [("hello ", "\nhow can I help you?")], "how much is 2+2?")
    assert dialog_ids(TOKENIZERS["llama2"], told) == [
        1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3492, 526, 20255, 29889, 13, 29966, 829, 14816, 29903, 6778,
        13, 13, 12199, 518, 29914, 25580, 29962, 920, 508, 306, 1371, 366, 29973, 29871, 2, 1, 518, 25580, 29962, 920,
        1568, 338, 29871, 29906, 29974, 29906, 29973, 518, 29914, 25580, 29962]


@given(keys(), st.sampled_from(DIALOGS))
def test_an_answer_is_forward_and_sampler_on_those_ids(chatty, key, dialog):
    sample, tokens = lf.sampler(0.9, top_k=50), meta_ids(chatty.tokenizer, dialog)
    begin, nats = len(tokens), []
    for _ in range(8):
        logits, _ = lf.forward(chatty.params, torch.tensor(tokens))
        drawn = int(sample(lf.random.fold_in(key, len(tokens)), logits[-1]))
        if drawn == chatty.tokenizer.eos_id:
            break
        nats.append(float(logits[-1].log_softmax(-1)[drawn]))
        tokens.append(drawn)
    answer, = lf.chat_completion(chatty, [dialog], key=key, max_new_tokens=8, sampler=sample, logprobs=True)
    assert answer.tokens == tokens[begin:] and answer.text == chatty.tokenizer.decode(tokens[begin:])
    assert answer.logprobs == pytest.approx(nats, abs=1e-5)


@given(keys(), st.permutations(range(3)), st.booleans())
def test_a_dialogs_answer_is_what_it_would_be_alone(chatty, key, order, one_key):
    each = key.expand(3, 2) if one_key else lf.random.split(key, 3)
    chosen = [DIALOGS[i] for i in order]
    together = lf.chat_completion(chatty, chosen, key=key if one_key else each, max_new_tokens=9)
    assert together == [lf.chat_completion(chatty, [dialog], key=k, max_new_tokens=9)[0]
                        for dialog, k in zip(chosen, each, strict=True)]
    assert together[0].logprobs is None


@pytest.mark.slow
def test_an_answer_goes_up_to_the_end_of_the_context(chatty):
    def never_end(key, logits, tokens):
        return logits.index_fill(-1, torch.tensor(chatty.tokenizer.eos_id), -math.inf).argmax(-1)

    answers = lf.chat_completion(chatty, DIALOGS, key=lf.random.key(0), sampler=never_end)
    assert [len(answer.tokens) + len(meta_ids(chatty.tokenizer, told)) for answer, told in
            zip(answers, DIALOGS, strict=True)] == [256] * 3
    assert lf.chat_completion(chatty, [], key=lf.random.key(0)) == []


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("i", range(4))
def test_a_tag_of_the_format_is_refused_in_every_message(tokenizer, tag, i):
    told = dialog("Be brief.", [("Who?", "Felix")], "and then?")
    told[i]["content"] += f"so{tag}so"
    with pytest.raises(ValueError, match=re.escape(f"message {i} contains '{tag}', a tag of the chat format itself")):
        dialog_ids(tokenizer, told)


def test_a_message_that_is_none_is_named(tokenizer):
    for wrong in ("hello", None, {"role": "user"}, {"content": "x"}, {"role": "user", "content": 3}, ["user", "x"]):
        with pytest.raises(ValueError, match='message 1 of a dialog needs strings under "role" and "content", got '):
            split_dialog([*dialog("Be brief.", []), wrong])


@pytest.mark.parametrize(("roles", "named"), [
    ("", "no message"), ("s", "system"), ("a", "assistant"), ("ua", "user, assistant"), ("uu", "user, user"),
    ("sua", "system, user, assistant"), ("us", "user, system"), ("uasu", "user, assistant, system, user"),
    ("sau", "system, assistant, user"), ("ssu", "system, system, user"), ("x", "x"),
])
def test_a_dialog_in_another_order_is_refused(tokenizer, roles, named):
    spelled = {"s": "system", "u": "user", "a": "assistant"}
    told = [{"role": spelled.get(role, role), "content": "words"} for role in roles]
    with pytest.raises(ValueError, match=rf"a dialog goes .*, and ends with the user, got {named}$"):
        dialog_ids(tokenizer, told)


def test_bad_requests_are_refused_at_once(chatty):
    key = lf.random.key(0)
    long = dialog(None, [], "words and words " * 40)
    count = len(meta_ids(chatty.tokenizer, long))
    with pytest.raises(ValueError, match=f"the prompt has {count} tokens, and the model's context is 256"):
        lf.chat_completion(chatty, [HELLO, long], key=key)
    with pytest.raises(ValueError, match=r"dialog 1: message 0 contains '\[INST\]'"):
        lf.chat_completion(chatty, [HELLO, dialog(None, [], "[INST]")], key=key)
    with pytest.raises(ValueError, match=r"dialog 1: a dialog goes .* got no message"):
        lf.chat_completion(chatty, [HELLO, []], key=key)
    with pytest.raises(ValueError, match=r"`dialogs.0` should be .*Message.*, got dict"):
        lf.chat_completion(chatty, HELLO, key=key)
    with pytest.raises(ValueError, match="2 keys for 1 prompts"):
        lf.chat_completion(chatty, [HELLO], key=lf.random.split(key, 2))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        lf.chat_completion(chatty, [HELLO], key=key, max_new_tokens=-1)
    with pytest.raises(ValueError, match=r"dialog 0: the text is not valid Unicode: character 8 .* U\+D800"):
        lf.chat_completion(chatty, [dialog(None, [], "a\ud800")], key=key)
