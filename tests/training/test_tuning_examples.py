"""Examples to learn from: which tokens of a record count, and which rows make a batch."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys

import llama_fn as lf
from llama_fn.training.examples import Examples, batch, in_order, read_examples, split

QUESTION, ANSWER = {"role": "user", "content": "Who was it?"}, {"role": "assistant", "content": "A fox."}
AGAIN, LAST = {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "He ran."}


def lines(folder, *records: object):
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read(folder, tokenizer, *records: object, context: int = 96, pairs: bool = False) -> Examples:
    return read_examples(lines(folder, *records), tokenizer, lf.dialog_tokens, context, pairs=pairs)


def learned(examples: Examples, tokenizer) -> list[str]:
    """The text of the tokens that count, row by row."""
    rows = zip(examples.tokens.flatten(0, -2), examples.mask.flatten(0, -2), strict=True)
    return [tokenizer.decode(tokens[mask].tolist()).strip() for tokens, mask in rows]


def test_of_a_text_every_token_counts(tmp_path, tokenizer):
    found = read(tmp_path, tokenizer, {"text": "Once upon a time"})
    assert found.tokens.tolist() == [tokenizer.encode("Once upon a time", eos=True)] and found.mask.all()
    (tmp_path / "a.txt").write_text("Once upon a time")
    plain = read_examples(tmp_path / "a.txt", tokenizer, lf.dialog_tokens, 96)
    assert all(map(torch.equal, plain, found))


@given(st.integers(1, 9), st.integers(1, 12))
def test_a_long_text_is_cut_so_that_each_token_is_predicted_once(tmp_path_factory, tokenizer, words, context):
    ids = tokenizer.encode("fox " * words, eos=True)
    found = read(tmp_path_factory.mktemp("data"), tokenizer, {"text": "fox " * words}, context=context)
    predicted = [int(x) for tokens, mask in zip(*found, strict=True) for x in tokens[1:][mask[1:]]]
    assert predicted == ids[1:] and found.tokens.shape[1] <= context + 1


def test_of_a_prompt_and_completion_the_completion_and_its_end_count(tmp_path, tokenizer):
    found = read(tmp_path, tokenizer, {"prompt": "Once upon", "completion": " a time"},
                 {"prompt": "", "completion": "A fox"})
    assert learned(found, tokenizer) == ["a time", "A fox"]
    whole = tokenizer.encode("Once upon a time", eos=True)
    assert found.tokens[0, :len(whole)].tolist() == whole and found.mask[0, len(whole) - 1]
    assert not found.mask[0, len(whole):].any() and not found.mask[:, 0].any()


def test_the_letters_of_a_prompt_that_merge_with_the_completion_count_with_it(tmp_path, tokenizer):
    found = read(tmp_path, tokenizer, {"prompt": "there wa", "completion": "s a fox"})
    assert learned(found, tokenizer) == ["was a fox"]


def test_of_a_chat_the_answers_count_as_in_dialog_tokens(tmp_path, tokenizer):
    dialogs = [[QUESTION, ANSWER, AGAIN, LAST], [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]]
    found = read(tmp_path, tokenizer, *({"messages": dialog} for dialog in dialogs))
    for tokens, mask, dialog in zip(*found, dialogs, strict=True):
        expected = lf.dialog_tokens(tokenizer, dialog)
        assert torch.equal(tokens[:len(expected.tokens)], expected.tokens)
        assert torch.equal(mask[:len(expected.mask)], expected.mask) and not mask[len(expected.mask):].any()


def test_a_preference_is_two_rows_with_the_last_answers_alone(tmp_path, tokenizer):
    dialog = [QUESTION, ANSWER, AGAIN]
    found = read(tmp_path, tokenizer, {"prompt": "Once upon", "chosen": " a time", "rejected": " a hill there"},
                 {"messages": dialog, "chosen": "He ran.", "rejected": "Nothing."},
                 {"prompt": dialog, "chosen": [LAST], "rejected": [{"role": "assistant", "content": "Nothing."}]},
                 pairs=True)
    assert found.tokens.shape[:2] == (3, 2)
    assert learned(found, tokenizer) == ["a time", "a hill there", "He ran.", "Nothing.", "He ran.", "Nothing."]
    assert torch.equal(found.tokens[1], found.tokens[2]) and torch.equal(found.mask[1], found.mask[2])
    expected = lf.dialog_tokens(tokenizer, [*dialog, LAST]).tokens
    assert torch.equal(found.tokens[1, 0, :len(expected)], expected)


def test_what_does_not_fit_is_cut_or_left_out_with_a_warning(tmp_path, tokenizer):
    long = {"prompt": "Once", "completion": " fox" * 40}
    with pytest.warns(UserWarning, match="data.jsonl: 2 examples are longer than the context of 12 tokens"):
        found = read(tmp_path, tokenizer, long, {"prompt": "fox " * 40, "completion": "a"}, {"text": "A fox"},
                     context=12)
    assert found.tokens.shape == (2, 13) and found.mask[0].any()
    with pytest.raises(ValueError, match="no example in it with a token to learn within the context of 3 tokens"):
        read(tmp_path, tokenizer, {"prompt": "fox " * 40, "completion": "a"}, context=3)


@pytest.mark.parametrize("record, pairs, message", [
    ({"words": "a"}, False, 'a record needs "text", "prompt" and "completion", or "messages"$'),
    ([1], False, 'a record needs "text"'),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, False, 'say --dpo'),
    ({"text": 3}, False, '"text" must be a string, got int'),
    ({"prompt": None, "completion": "b"}, False, '"prompt" must be a string, got NoneType'),
    ({"messages": "hello"}, False, '"messages" must be a list of messages'),
    ({"messages": [ANSWER]}, False, "a dialog goes"),
    ({"messages": [{"role": "user", "content": "[INST]"}, ANSWER]}, False, "a tag of the chat format"),
    ({"text": "a"}, True, 'a preference needs "prompt" or "messages", and "chosen" and "rejected"'),
    ({"prompt": "a", "chosen": "b"}, True, "a preference needs"),
    ({"prompt": [QUESTION], "chosen": [ANSWER, AGAIN], "rejected": "b"}, True, "must end with the assistant's answer"),
    ({"text": "\ud800"}, False, "surrogate"),
])
def test_a_record_that_is_none_is_named(tmp_path, tokenizer, record, pairs, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"} if pairs else {"text": "A fox."}
    with pytest.raises(ValueError, match=rf"data.jsonl, line 2: .*{message}"):
        read(tmp_path, tokenizer, good, record, pairs=pairs)


def test_an_empty_file_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="data.jsonl: no text in it"):
        read(tmp_path, tokenizer)


# --- batches


def numbered(count: int) -> Examples:
    """Examples that say which they are."""
    tokens = torch.arange(count)[:, None] * 10 + torch.arange(3)
    return Examples(tokens, tokens % 10 > 0)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), keys())
def test_each_example_comes_once_an_epoch(count, micro, size, key):
    examples, steps = numbered(count), count  # which is a whole number of epochs
    batches = [batch(examples, key, step, (micro, size)) for step in range(steps)]
    assert all(part.tokens.shape == (micro, size, 3) for part in batches)
    order = torch.cat([part.tokens[..., 0].flatten() for part in batches]) // 10
    for epoch in order.split(count):
        assert sorted(epoch.tolist()) == list(range(count))
    assert all(torch.equal(part.mask, part.tokens % 10 > 0) for part in batches)


def test_a_batch_depends_on_key_and_step_alone_and_epochs_differ():
    examples, key = numbered(40), lf.random.key(3)
    one, again = (batch(examples, key, 7, (2, 3)) for _ in range(2))
    assert torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.tokens, batch(examples, lf.random.key(4), 7, (2, 3)).tokens)
    first, second = (batch(examples, key, epoch, (1, 40)).tokens for epoch in range(2))
    assert not torch.equal(first, second)


@given(st.integers(40, 300), st.integers(0, 2**20))
def test_what_is_held_out_is_a_matter_of_its_tokens(count, seed):
    tokens = lf.random.randint(lf.random.key(seed), (count, 5), 0, 3, torch.int64)  # some are equal
    examples = Examples(tokens, tokens > 0)
    training, held_out = split(examples)
    parts = [{tuple(row) for row in part.tokens.tolist()} for part in (training, held_out) if part is not None]
    assert len(training.tokens) + (0 if held_out is None else len(held_out.tokens)) == count
    assert len(parts) == 1 or not parts[0] & parts[1]
    order = torch.arange(count).flip(0)
    again, _ = split(Examples(*(x[order] for x in examples)))
    assert {tuple(row) for row in again.tokens.tolist()} == parts[0]


def test_about_one_in_twenty_is_held_out_and_none_of_few():
    training, held_out = split(numbered(2000))
    assert 60 < len(held_out.tokens) < 140 and len(training.tokens) + len(held_out.tokens) == 2000
    few, none = split(numbered(39))
    assert len(few.tokens) == 39 and none is None


def test_in_order_is_every_example_once():
    parts = list(in_order(numbered(7), 3))
    assert [len(part.tokens) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.tokens for part in parts]), numbered(7).tokens)
