"""Documents become tokens, in order, on all cores; what is learned of each."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import unicode_texts

import llama_fn as lf
from llama_fn.training import encode as encoding
from llama_fn.training.encode import ahead, encode, encoded
from llama_fn.training.texts import Dialog, Prompt, plain

DIALOG = Dialog(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was it?"},
                 {"role": "assistant", "content": "A fox."}, {"role": "user", "content": "And then?"},
                 {"role": "assistant", "content": "It slept."}))


@given(unicode_texts(), st.integers(1, 9))
def test_a_text_has_its_tokens_with_begin_and_end_and_all_are_learned(tokenizer, text, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PIECE", piece)
        tokens, learned = encode(text, tokenizer)
    assert tokens.tolist() == tokenizer.encode(text, bos=True, eos=True) and learned is None


def test_a_vocabulary_with_tokens_across_lines_has_the_tokens_of_the_whole_text(monkeypatch):
    """A tokenizer that joins a newline with what follows: pieces would begin in the middle of a token."""
    import io

    import sentencepiece as spm
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 9), model_writer=out, model_type="bpe", vocab_size=270, byte_fallback=True,
        user_defined_symbols=["\nx"], normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2)
    tokenizer, text = lf.Tokenizer(out.getvalue()), "a\nx b\nx\na" * 3
    assert len(tokenizer.encode("\nx", bos=False)) < 1 + len(tokenizer.encode("\n", bos=False))
    monkeypatch.setattr(encoding, "PIECE", 1)
    assert encode(text, tokenizer).tokens.tolist() == tokenizer.encode(text, eos=True)


@given(unicode_texts(max_size=20), unicode_texts(max_size=20))
def test_of_a_prompt_with_a_completion_the_completion_is_learned(tokenizer, prompt, completion):
    tokens, learned = encode(Prompt(prompt, completion), tokenizer)
    whole, alone = tokenizer.encode(prompt + completion, eos=True), tokenizer.encode(prompt)
    assert tokens.tolist() == whole and learned.tolist() == sorted(learned) and learned[-1] and not learned[0]
    count = int((~learned).sum())
    assert whole[:count] == alone[:count]  # nothing of the completion is left out ...
    assert count == len(alone) or whole[count] != alone[count]  # ... and only a token where they meet is shared


def test_of_a_dialog_the_answers_are_learned_in_llama_2s_format(tokenizer):
    tokens, learned = encode(DIALOG, tokenizer, lf.dialog_tokens)
    expected = lf.dialog_tokens(tokenizer, DIALOG.messages)
    assert tokens.tolist() == expected.tokens.tolist() and learned.tolist() == expected.mask.tolist()
    parts = np.split(tokens, np.flatnonzero(np.diff(learned)) + 1)[1::2]
    assert [tokenizer.decode(part.tolist()).strip() for part in parts] == ["A fox.", "It slept."]


def test_a_dialog_that_cannot_be_encoded_is_named(tokenizer):
    with pytest.raises(ValueError, match="pass dialog_tokens=lf.dialog_tokens"):
        encode(DIALOG, tokenizer)
    tagged = Dialog(({"role": "user", "content": "[INST] now"}, DIALOG.messages[2]))
    with pytest.raises(ValueError, match=r"the dialog that begins '\[INST\] now': message 0 contains '\[INST\]'"):
        encode(tagged, tokenizer, lf.dialog_tokens)


@given(st.lists(unicode_texts(max_size=9) | st.builds(Prompt, unicode_texts(max_size=5), unicode_texts(max_size=5)),
                max_size=20), st.integers(1, 30))
def test_documents_are_encoded_in_order_and_every_byte_is_reported(tokenizer, documents, chunk):
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "CHUNK", chunk)
        found = list(encoded(iter(documents), tokenizer, report=done.append))
    for (tokens, learned), document in zip(found, documents, strict=True):
        own = encode(document, tokenizer)
        assert np.array_equal(tokens, own.tokens)
        assert learned is own.learned is None or np.array_equal(learned, own.learned)
    assert sum(done) == sum(len(plain(document).encode()) for document in documents)


def test_only_a_few_items_are_ahead_of_the_one_that_is_given(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    drawn = []
    results = ahead(lambda x: (x, threading.get_ident()), (drawn.append(i) or i for i in range(100)))
    given = [next(results)[1] for _ in range(20)]
    assert len(drawn) <= 20 + 2 * 3
    assert [x for x, _ in given] == list(range(20)) and threading.get_ident() not in {thread for _, thread in given}
    results.close()
    assert len(drawn) <= 20 + 2 * 3


def test_an_error_comes_where_its_document_stands(tokenizer):
    def documents():
        yield from ("a text", "another")
        raise ValueError("line 3: not JSON")

    with pytest.raises(ValueError, match="line 3"):
        list(encoded(documents(), tokenizer))
    with pytest.raises(ValueError, match="lone surrogate"):
        list(encoded(["a", "\ud800", "b"], tokenizer))
