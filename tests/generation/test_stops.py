"""Stop strings: found where the whole text, decoded again at every token, would have them, at the cost of a token."""

import pytest
from dialogs import plays, talker
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import unicode_texts

import llama_fn as lf
from llama_fn.generation.stop_strings import stops

PROMPTS = ["", "One", "Once upon a time"]
BYTES = range(3, 259)  # the tokens of single bytes


def first_stop(tokenizer: lf.Tokenizer, prompt: str, ids: list[int], stop: list[str]) -> int | None:
    """How many tokens there are when a stop string is in their text; all of it is decoded at every token."""
    return next((n for n in range(1, len(ids) + 1)
                 if any(s in tokenizer.decode(ids[:n], continued=prompt != "") for s in stop)), None)


@st.composite
def rows(draw, tokenizer: lf.Tokenizer) -> tuple[list[list[int]], list[str]]:
    """Tokens for each prompt, of texts, single bytes, controls and any others; and stop strings, some of them there."""
    text = unicode_texts(max_size=6).map(lambda text: tokenizer.encode(text, bos=False))
    some = st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 2) | st.sampled_from(BYTES), max_size=4)
    written = [[id for part in draw(st.lists(text | some, max_size=4)) for id in part] for _ in PROMPTS]
    stop = draw(st.lists(st.text("the 漢é", min_size=1, max_size=3), max_size=2))
    for prompt, ids in zip(PROMPTS, written, strict=True):
        told = tokenizer.decode(ids, continued=prompt != "")
        begin = draw(st.integers(0, 9))
        stop += [told[begin:begin + draw(st.integers(1, 5))] or "never"]
    return written, [s for s in stop if "\ufffd" not in s]


@given(st.data())
def test_a_stop_is_found_where_decoding_all_again_finds_it(tokenizer, data):
    written, stop = data.draw(rows(tokenizer))
    stopped, found = stops(tokenizer, PROMPTS, stop), [None] * len(PROMPTS)
    for n in range(max(map(len, written))):  # a token a row, in turns
        for row, ids in enumerate(written):
            if n < len(ids) and found[row] is None and stopped(row, ids[n]):
                found[row] = n + 1
    assert found == [first_stop(tokenizer, prompt, ids, stop) for prompt, ids in zip(PROMPTS, written, strict=True)]


def test_only_a_texts_first_word_loses_its_space(tokenizer):
    space = tokenizer.processor.piece_to_id("\u2581")
    for begin, expected in (([], [False] * 3), ([1, space], [False, False, True]), ([1, 1], [False] * 3)):
        ids = [*begin, tokenizer.encode("the", bos=False)[0]]
        stopped = stops(tokenizer, [""], [tokenizer.processor.id_to_piece(ids[-1]).replace("\u2581", " ")])
        assert [stopped(0, id) for id in ids] == expected[:len(ids)]


@pytest.mark.parametrize("prompt", ["", "One"])
@pytest.mark.parametrize("some", [range(401), BYTES, [1, 2], [3 + 0xE6], [3 + 0xE6, 3 + 0xBC, 1], [300]])
def test_a_token_costs_the_same_however_long_the_text_is(tokenizer, some, prompt):
    chosen, decoded = lf.random.randint(lf.random.key(0), (400,), 0, len(some)).tolist(), 0
    ids = [some[i] for i in chosen]

    class Counting:
        def decode_stream(self, ids, continued):
            def counted():
                nonlocal decoded
                for id in ids:
                    decoded += 1
                    yield id

            return tokenizer.decode_stream(counted(), continued)

    stopped = stops(Counting(), [prompt], ["never", "\u2028" * 20])
    assert not any(stopped(0, id) for id in ids)
    assert decoded <= 9 * len(ids)  # what has begun a character, or says nothing, is decoded with the next token, too


@given(st.data(), st.sampled_from(PROMPTS))
@example(None, "")
def test_completion_and_stream_end_at_the_same_stop(model, data, prompt):
    tokenizer = model.tokenizer
    written, stop = ([tokenizer.encode("é", bos=False)] * 3, ["\ufffd"]) if data is None else data.draw(rows(tokenizer))
    ids = [id for id in written[PROMPTS.index(prompt)] if id != tokenizer.eos_id]
    own = {"key": lf.random.key(0), "stop": stop, "sampler": plays(ids, len(tokenizer.encode(prompt)))}
    told, = lf.text_completion(model, [prompt], **own)
    assert told.text == "".join(lf.stream(model, prompt, **own))
    assert told.tokens == ids[:first_stop(tokenizer, prompt, ids, stop) if data is not None else None]
    if not any(s in told.text for s in stop):
        assert tokenizer.decode(ids, continued=prompt != "").startswith(told.text)


def test_a_stop_is_not_looked_for_in_the_prompt_nor_across_its_end(tokenizer):
    model = talker(tokenizer, 64)
    ids = tokenizer.encode("fox and", bos=False)
    own = {"key": lf.random.key(0), "sampler": plays(ids, len(tokenizer.encode("a fox and a")))}
    told, = lf.text_completion(model, ["a fox and a"], stop=["a fox", "a"], echo=True, **own)
    assert told.text == "a fox and a fox "
    with pytest.raises(ValueError, match="stop is one string; put it in a list"):
        lf.text_completion(model, ["a"], key=lf.random.key(0), stop="a")
