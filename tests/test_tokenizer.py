import os
import pickle
import re
import signal
import threading
import time

import pytest
import sentencepiece as spm
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import unicode_texts
from vocabularies import TALES, TOKENIZERS, on_each

import llama_fn as lf

# U+2581 is how SentencePiece writes a space, so it comes back as one. Nothing else is changed, not even NUL.
kept = unicode_texts().filter(lambda text: "\u2581" not in text)
# Special tokens at first, then words, and bytes that make characters or do not.
words_and_bytes = st.integers(259, 400) | st.integers(3, 258) | st.integers(0xC0 + 3, 0xFF + 3) | st.integers(0, 2)
ids = st.builds(lambda first, rest: first + rest, st.lists(st.integers(0, 2), max_size=2), st.lists(words_and_bytes))


@on_each
@given(kept)
@example("  the  cat ")
def test_decoding_what_was_encoded_gives_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@on_each
def test_only_the_sign_for_a_space_comes_back_as_a_space(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"
    for text in ("", " ", "  a  b  ", "\0", "a\r\nb\n", "\t", "\ufeffa", "\u00a0", "\ufffd", "\u2047", "e\u0301", "ﬁ"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@on_each
@given(unicode_texts(), st.booleans(), st.booleans())
def test_encoding_is_sentencepiece_between_bos_and_eos(tokenizer, text, bos, eos):
    assert tokenizer.encode(text, bos, eos) == [1] * bos + tokenizer.processor.encode(text) + [2] * eos
    assert tokenizer.encode(text) == tokenizer.encode(text, bos=True, eos=False)


@on_each
@given(ids)
@example([1, 262])  # " a" in the one vocabulary
@example([1, 263])  # and in the other: after the begin, too, the first word loses its space
def test_decoding_is_that_of_sentencepiece(tokenizer, ids):
    assert tokenizer.decode(ids) == tokenizer.processor.decode(ids)


@on_each
@given(ids, st.booleans())
@example([262], True)  # " a" in the one vocabulary
@example([263], True)  # and in the other
def test_a_stream_of_pieces_joins_to_the_decoding_of_the_whole(tokenizer, ids, continued):
    pieces = list(tokenizer.decode_stream(iter(ids), continued))
    assert "".join(pieces) == tokenizer.decode(ids, continued)
    assert "" not in pieces


@on_each
@given(kept)
def test_a_stream_waits_for_whole_characters_only(tokenizer, text):
    """Whatever has come of a text's tokens, the pieces are a beginning of the text, never half a character."""
    tokens, told = tokenizer.encode(text), ""
    coming = iter(tokens)
    for piece in tokenizer.decode_stream(coming):
        told += piece
        seen = len(tokens) - coming.__length_hint__()
        assert told == tokenizer.decode(tokens[:seen])  # nothing that could be told is held back
        assert text.startswith(told)


@on_each
@given(kept)
@example("the cat and the fox")
def test_a_prompt_and_its_continuation_join_to_the_whole(tokenizer, text):
    tokens = tokenizer.encode(text)
    for end in range(2, len(tokens) + 1):  # after the begin alone, the first word is still to come
        begun = tokenizer.decode(tokens[:end])
        if "\ufffd" not in begun:  # cut between characters
            assert begun + tokenizer.decode(tokens[end:], continued=True) == tokenizer.decode(tokens)


@on_each
@given(st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "<0x41>", "[INST]", "a", " "])).map("".join))
def test_special_tokens_written_in_a_text_are_text(tokenizer, text):
    tokens = tokenizer.encode(text, bos=False)
    assert not {0, 1, 2} & set(tokens)
    assert tokenizer.decode(tokens) == text


@on_each
def test_begin_and_end_say_nothing(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 2, 1]) == "a b"
    assert tokenizer.decode([1, 2]) == tokenizer.decode([]) == ""


@on_each
@given(unicode_texts(), st.characters(categories=["Cs"]), unicode_texts())
def test_half_a_surrogate_pair_is_an_error(tokenizer, before, half, after):
    with pytest.raises(ValueError, match=rf"character {len(before)} is the lone surrogate U\+{ord(half):04X}"):
        tokenizer.encode(before + half + after)


@on_each
@given(ids, st.integers(-10**6, -1) | st.integers(32000, 10**6), ids)
def test_a_token_outside_the_vocabulary_is_an_error(tokenizer, before, token, after):
    for decode in (tokenizer.decode, lambda tokens: list(tokenizer.decode_stream(tokens))):
        with pytest.raises(ValueError, match=rf"token {token} is outside the vocabulary of {tokenizer.vocab_size}"):
            decode([*before, token, *after])


@on_each
def test_tokenizers_are_equal_if_their_files_are(tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    again = lf.load_tokenizer(tmp_path / "tokenizer.model")
    assert again == tokenizer and hash(again) == hash(tokenizer) and again is not tokenizer
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    assert lf.tree.leaves(tokenizer) == [] and lf.tree.structure(again) == lf.tree.structure(tokenizer)


@pytest.mark.parametrize("damage", [lambda model: b"", lambda model: b"no model", lambda model: model[:1000],
                                    lambda model: bytes(len(model))])
def test_a_damaged_file_is_an_error_that_names_it(tokenizer, tmp_path, damage):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(damage(tokenizer.model))
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: not a SentencePiece model"):
        lf.load_tokenizer(file)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.model"):
        lf.load_tokenizer(tmp_path / "missing.model")


def test_the_same_texts_train_the_same_tokenizer(texts, tokenizer):
    assert lf.train_tokenizer(iter(texts), 401) == tokenizer
    assert lf.train_tokenizer(texts[1:], 401) != tokenizer


@pytest.mark.parametrize("texts, size", [(["a"], 262), (["the cat sat on the mat."] * 9, None), (TALES, 1024),
                                         (["".join(map(chr, range(0x4e00, 0x4e00 + 1500)))] * 3, None)])
def test_a_size_that_is_not_given_is_one_that_fits(texts, size):
    learned = lf.train_tokenizer(texts)
    assert size in (None, learned.vocab_size)
    assert learned == lf.train_tokenizer(texts, learned.vocab_size)  # to the last byte of the file
    assert all(not learned.processor.is_byte(id) for id in learned.encode("".join(texts)))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a.jsonl, line 7: not JSON"), MemoryError(),
                                   FileNotFoundError(2, "No such file", "a.txt"), RuntimeError("own"),
                                   UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")], ids=repr)
@pytest.mark.parametrize("size", [None, 280])
def test_an_error_of_the_texts_comes_out_as_it_is(error, size):
    def texts():
        yield "a text"
        raise error

    with pytest.raises(type(error)) as caught:
        lf.train_tokenizer(texts(), size)
    assert caught.value is error


def test_ctrl_c_stops_the_learning_at_once(monkeypatch):
    learning, hold = [], threading.Event()

    def slow(**settings):  # as SentencePiece does, it lets other threads run, but in the main one it would hear nothing
        learning.append(threading.current_thread())
        os.kill(os.getpid(), signal.SIGINT)
        hold.wait(40)

    monkeypatch.setattr(spm.SentencePieceTrainer, "train", slow)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        lf.train_tokenizer(["a text"], 280)
    assert time.monotonic() - begun < 30 and learning[0] is not threading.main_thread() and learning[0].daemon
    hold.set()


def test_a_trained_tokenizer_has_the_parts_of_llama_2s(tokenizer):
    processor = tokenizer.processor
    assert tokenizer.vocab_size == 401
    assert [processor.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [processor.id_to_piece(i) for i in range(3, 259)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert all(processor.is_byte(i) for i in range(3, 259)) and not processor.is_byte(259)


def test_digits_are_tokens_by_themselves():
    tokenizer = lf.train_tokenizer(["year 2024, year 2024, year 2023"] * 20, 275)
    assert len(tokenizer.encode("2024", bos=False)) == 5  # the space before a text's first word is one, too


@pytest.mark.parametrize("texts, size, reason", [
    (["a b c"], 5000, "no tokenizer of 5000 tokens can be learned"),
    (["abc " * 50], 200, "no tokenizer of 200 tokens can be learned"),
    ([], 400, "no tokenizer of 400 tokens can be learned"),
    (["", " \n\n "], 400, "no tokenizer of 400 tokens can be learned"),
])
def test_texts_that_cannot_fill_the_vocabulary_are_an_error(texts, size, reason):
    with pytest.raises(ValueError, match=reason + r" from these texts: \S+"):
        lf.train_tokenizer(texts, size)


# LLaMA 2's own ids, from Meta's file by SentencePiece 0.2.3; the first is 1, the begin.
TRICKY = {
    "Hello, world!": [15043, 29892, 3186, 29991],
    "  two  spaces ": [259, 1023, 29871, 8162, 29871],
    "\n\n\ttab": [29871, 13, 13, 12, 3891],
    "I've 12345 apples": [306, 29915, 345, 29871, 29896, 29906, 29941, 29946, 29945, 623, 793],
    "naïve café": [1055, 30085, 345, 274, 28059],
    "漢字とかな": [29871, 31652, 30578, 30364, 30412, 30371],
    "\U0001f999 llama": [29871, 243, 162, 169, 156, 11148, 3304],
    "<s>[INST] no </s>": [529, 29879, 24566, 25580, 29962, 694, 1533, 29879, 29958],
    "ﬁ ﬂ ½": [29871, 31017, 29871, 242, 175, 133, 29871, 30226],
    "f = lambda x: x**2": [285, 353, 14013, 921, 29901, 921, 1068, 29906],
    "\u200bzero": [29871, 30166, 9171],
    "": [],
}


@pytest.mark.skipif("llama2" not in TOKENIZERS, reason="Meta's license keeps LLaMA 2's tokenizer.model out of the "
                    "repository: LLAMA2_TOKENIZER=/path/to/tokenizer.model runs this test")
def test_tricky_strings_have_llama_2s_ids():
    tokenizer = TOKENIZERS["llama2"]
    assert {text: tokenizer.encode(text) for text in TRICKY} == {text: [1, *ids] for text, ids in TRICKY.items()}
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
