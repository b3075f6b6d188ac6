"""A dialog to learn from: Meta's tokens, and a mask of the answers and their ends."""

import pytest
import torch
from dialogs import answers, dialog, meta_ids, questions, systems, talker
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import on_each

import llama_fn as lf

closed = st.builds(dialog, systems, st.lists(st.tuples(questions, answers), min_size=1, max_size=3))
opened = st.builds(dialog, systems, st.lists(st.tuples(questions, answers), max_size=2), questions)


@on_each
@given(closed | opened)
def test_tokens_are_metas_and_the_mask_is_the_answers_and_their_ends(tokenizer, dialog):
    tokens, mask = lf.dialog_tokens(tokenizer, dialog)
    whole = meta_ids(tokenizer, [*dialog, {"role": "user", "content": "?"}] if len(dialog) % 2 == (
        dialog[0]["role"] == "system") else dialog)
    assert tokens.tolist() == whole[:len(tokens)] and tokens.dtype == torch.int64 and mask.dtype == torch.bool
    said = [message["content"].strip() for message in dialog if message["role"] == "assistant"]
    learned, pieces = tokens[mask].tolist(), []
    assert learned.count(tokenizer.eos_id) == len(said)  # </s> written out in an answer is plain text
    while learned:
        end = learned.index(tokenizer.eos_id)
        pieces.append(tokenizer.decode(learned[:end], continued=True).strip(" "))
        learned = learned[end + 1:]
    assert pieces == [answer.strip(" ") for answer in said]
    begins = tokens == tokenizer.bos_id
    assert not mask[begins].any() and int(begins.sum()) == sum(message["role"] == "user" for message in dialog)


@given(st.lists(closed, min_size=1, max_size=3))
def test_the_loss_under_the_mask_is_that_of_the_answers(tokenizer, dialogs):
    params = talker(tokenizer).params
    rows = [lf.dialog_tokens(tokenizer, dialog) for dialog in dialogs]
    nats = []
    for tokens, mask in rows:
        each = lf.forward(params, tokens)[0].log_softmax(-1)
        nats += [-float(each[i - 1, tokens[i]]) for i in range(len(tokens)) if mask[i]]
    pad = torch.nn.utils.rnn.pad_sequence
    tokens, mask = (pad(list(x), batch_first=True) for x in zip(*rows, strict=True))
    assert float(lf.loss(params, tokens, mask)) == pytest.approx(sum(nats) / len(nats), abs=1e-9)


def test_training_on_a_dialog_teaches_the_answer(tokenizer):
    model = talker(tokenizer)
    talk = dialog("Be brief.", [("Who was the fox?", "Felix")])
    params, optimizer = lf.tree.map(lambda x: x.float(), model.params), lf.optim.adamw(1e-2)
    state = optimizer.init(params)
    for _ in range(25):
        grads = torch.func.grad(lf.loss)(params, *lf.dialog_tokens(tokenizer, talk))
        updates, state = optimizer.update(grads, state, params)
        params = lf.optim.apply_updates(params, updates)
    told, = lf.chat_completion(lf.Model(params, tokenizer), [talk[:-1]], key=lf.random.key(0), max_new_tokens=20,
                               sampler=lf.sampler(0.0))
    assert told.text.strip() == "Felix"


def test_what_is_no_dialog_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"a dialog goes .*, got user, user"):
        lf.dialog_tokens(tokenizer, dialog(None, [], "a") * 2)
    with pytest.raises(ValueError, match=r"message 0 contains '\[INST\]'"):
        lf.dialog_tokens(tokenizer, dialog(None, [("[INST]", "a")]))
    for nothing in ([], [{"role": "system", "content": "Be brief."}]):
        with pytest.raises(ValueError, match="a dialog goes|the dialog has no question"):
            lf.dialog_tokens(tokenizer, nothing)
