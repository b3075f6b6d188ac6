"""What a SentencePiece model's own settings say is done: in encoding, in decoding, and in files for other programs."""

import io
import json

import pytest
import sentencepiece
import torch
from hugging_face import silence  # noqa: F401, a fixture
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import unicode_texts
from transformers import AutoTokenizer

import llama_fn as lf
from llama_fn.sentencepiece_model import CONTROL, Piece, Settings, bpe_model, pieces_of, settings_of

LLAMA = {"model_type": "bpe", "vocab_size": 401, "byte_fallback": True, "split_digits": True,
         "allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
OTHERS = {
    "as LLaMA's": {}, "no dummy prefix": {"add_dummy_prefix": False},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "no dummy prefix, extra spaces removed": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "spaces as suffixes": {"treat_whitespace_as_suffix": True},
    "spaces as suffixes, no dummy": {"treat_whitespace_as_suffix": True, "add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 120, "unk_surface": "(?)"},
    "symbols of the user": {"user_defined_symbols": ["<x>", "foo bar"]}, "normalized": {
        "normalization_rule_name": "nmt_nfkc"}, "unigram": {"model_type": "unigram"}, "other ids": {
            "unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2}, "control symbols": {"control_symbols": ["<c>"]},
    "no begin": {"bos_id": -1}}
UNUSUAL = {"extra spaces removed": ["remove_extra_whitespaces=True"], "no dummy prefix, extra spaces removed": [
    "remove_extra_whitespaces=True"], "spaces as suffixes": ["whitespace_as_suffix=True"],
    "spaces as suffixes, no dummy": ["whitespace_as_suffix=True"], "no bytes": ["byte_fallback=False"],
    "symbols of the user": ["user_defined_symbols=True"], "normalized": ["normalized=True"], "unigram": ["bpe=False"]}
PRECISE = [name for name in OTHERS if name not in UNUSUAL]
FAITHFUL = [*PRECISE, "spaces as suffixes, no dummy", "symbols of the user", "unigram"]  # nothing of a text is lost


@pytest.fixture(scope="module")
def trained(texts):
    """Tokenizers by their settings."""
    made = {}
    for name, settings in OTHERS.items():
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, num_threads=1,
                                                 minloglevel=2, **{**LLAMA, **settings})
        made[name] = lf.Tokenizer(out.getvalue())
    return made


ids = st.lists(st.integers(0, 118) | st.integers(0, 5))
kept = unicode_texts().filter(lambda text: "\u2581" not in text)
on_all = pytest.mark.parametrize("name", OTHERS)


@on_all
@given(ids)
def test_decoding_is_that_of_sentencepiece(trained, name, ids):
    tokenizer = trained[name]
    assert tokenizer.decode(ids) == tokenizer.processor.decode(ids)


@on_all
@given(unicode_texts())
@example(" hello")
@example("  two  spaces ")
def test_what_was_encoded_decodes_as_by_sentencepiece(trained, name, text):
    tokenizer = trained[name]
    ids = tokenizer.encode(text, bos=name != "no begin")
    assert tokenizer.decode(ids) == tokenizer.processor.decode(tokenizer.processor.encode(text))
    assert "".join(tokenizer.decode_stream(iter(ids))) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", FAITHFUL)
@given(kept)
@example(" hello")
def test_decoding_what_was_encoded_gives_the_text(trained, name, text):
    tokenizer = trained[name]
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


@pytest.mark.parametrize("name", FAITHFUL)
@given(kept)
@example("the cat and the fox")
def test_a_prompt_and_its_continuation_join_to_the_whole(trained, name, text):
    tokenizer = trained[name]
    tokens = tokenizer.encode(text, bos=False)
    for end in range(1, len(tokens) + 1):
        begun = tokenizer.decode(tokens[:end])
        if begun and "\ufffd" not in begun:
            assert begun + tokenizer.decode(tokens[end:], continued=True) == tokenizer.decode(tokens)


def test_a_token_that_the_tokenizer_does_not_have_is_an_error(trained):
    with pytest.raises(ValueError, match="no token to begin a text with; encode with bos=False"):
        trained["no begin"].encode("a")


@on_all
def test_settings_and_pieces_are_read_as_by_protobuf(trained, name):
    from sentencepiece import sentencepiece_model_pb2

    model = trained[name].model
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert settings_of(model) == Settings(
        trainer.model_type == 2, trainer.byte_fallback, trainer.treat_whitespace_as_suffix,
        bool(normalizer.precompiled_charsmap), normalizer.remove_extra_whitespaces, name == "symbols of the user",
        normalizer.add_dummy_prefix)
    assert pieces_of(model) == [Piece(x.piece, x.score, x.type) for x in proto.pieces]
    assert settings_of(model).unusual() == UNUSUAL.get(name, [])


@given(st.booleans(), st.integers(-1, 2), st.floats(-1e9, 0, width=32))
def test_a_model_that_is_written_is_read_as_by_protobuf(prefix, pad, score):
    from sentencepiece import sentencepiece_model_pb2

    pieces = [Piece("<unk>", 0.0, 2), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL),
              Piece("\u2581é漢", score)]
    proto = sentencepiece_model_pb2.ModelProto.FromString(bpe_model(pieces, prefix, {"unk": 0, "bos": 1, "eos": -1,
                                                                                    "pad": pad}))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert [Piece(x.piece, x.score, x.type) for x in proto.pieces] == pieces
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) == (0, 1, -1, pad)
    assert (trainer.model_type, trainer.vocab_size, trainer.byte_fallback, trainer.bos_piece) == (2, 4, True, "<s>")
    assert (normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces) == ("identity", prefix,
                                                                                                 False)


# --- saved


def saved(tokenizer: lf.Tokenizer, folder, format: str = "hf") -> None:
    params = lf.init_params(lf.random.key(0), lf.Config(12, 1, 2, 1, tokenizer.vocab_size, 10))
    lf.save(lf.Model(params, tokenizer), folder, format=format)


@pytest.fixture(scope="module")
def theirs(trained, tmp_path_factory):
    """What transformers reads of the folders that we write."""
    loaded = {}
    for name in PRECISE:
        saved(trained[name], folder := tmp_path_factory.mktemp("hf"))
        assert lf.load(folder).tokenizer == trained[name]
        loaded[name] = AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.mark.parametrize("name", PRECISE)
@given(unicode_texts())
@example(" hello")
@example("  two  spaces ")
def test_transformers_encodes_and_decodes_as_we_do(trained, theirs, name, text):
    ids = trained[name].encode(text, bos=name != "no begin")
    assert theirs[name].encode(text) == ids
    assert theirs[name].decode(ids, skip_special_tokens=True) == trained[name].decode(ids)


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_transformers_would_encode_otherwise_is_a_warning(trained, tmp_path, name):
    with pytest.warns(UserWarning, match=f"transformers will encode .* otherwise .* has .*{UNUSUAL[name][0]}"):
        saved(trained[name], tmp_path)
    assert lf.load(tmp_path).tokenizer == trained[name]
    prefix = settings_of(trained[name].model).dummy_prefix
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_prefix_space"] == prefix


@pytest.mark.parametrize("name", OTHERS)
def test_what_run_c_would_encode_otherwise_is_refused(trained, tmp_path, name):
    if name == "as LLaMA's":
        saved(trained[name], tmp_path, "llama2c")
        return
    with pytest.raises(ValueError, match="run.c would encode texts otherwise than this tokenizer, which has "):
        saved(trained[name], tmp_path / "new", "llama2c")
    assert not (tmp_path / "new").exists()
    params = lf.init_params(lf.random.key(0), lf.Config(12, 1, 2, 1, 401, 10))
    lf.save(lf.Model(params, None), tmp_path / "new", format="llama2c")
    assert torch.equal(lf.load(tmp_path / "new").params.norm, params.norm)
