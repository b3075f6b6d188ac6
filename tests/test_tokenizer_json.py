"""Folders with Hugging Face's `tokenizer.json` alone: the same ids as transformers, and what cannot be had refused."""

import json
import math
import re
from pathlib import Path

import pytest
from hugging_face import silence  # noqa: F401, a fixture
from hypothesis import assume, example, given
from strategies import unicode_texts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaTokenizer, PreTrainedTokenizerFast
from vocabularies import TOKENIZERS

import llama_fn as lf
from llama_fn.sentencepiece_model import pieces_of
from llama_fn.tokenizer import tokenizer_of_json
from llama_fn.tokenizer_json import written

on_each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
LAYOUTS = {"prepend": (True, True), "first": (True, False), "none": (False, True)}


def settings_of(tokenizer: lf.Tokenizer, prefix: bool = True, legacy: bool = True) -> dict:
    return json.loads(json.dumps(written(pieces_of(tokenizer.model), {}, prefix, legacy, tokenizer.bos_id)))


def old(settings: dict) -> dict:
    """As older versions of `tokenizers` wrote it: a merge is one string."""
    model = settings["model"]
    return {**settings, "model": {**model, "merges": [" ".join(pair) for pair in model["merges"]]}}


@pytest.fixture(scope="module")
def rebuilt():
    return {name: tokenizer_of_json(old(settings_of(tokenizer))) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(unicode_texts())
@example("  two   spaces    and more ")
def test_a_rebuilt_tokenizer_has_the_ids_and_texts_of_the_original(rebuilt, name, text):
    ids = TOKENIZERS[name].encode(text)
    assert rebuilt[name].encode(text) == ids
    assert rebuilt[name].decode(ids) == TOKENIZERS[name].decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_rebuilt_tokenizer_has_the_originals_pieces(rebuilt, name):
    mine, theirs = (pieces_of(tokenizer.model) for tokenizer in (rebuilt[name], TOKENIZERS[name]))
    assert [(x.text, x.type) for x in mine] == [(x.text, x.type) for x in theirs]
    if name == "stories":  # LLaMA 2's spaces stand out of order
        assert mine == theirs
    assert (rebuilt[name].bos_id, rebuilt[name].eos_id) == (1, 2) and rebuilt[name].legacy


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Folders with a `tokenizer.json`, ours and of transformers' own, and what transformers makes of them."""
    folders = {}
    for layout, how in LAYOUTS.items():
        folders[layout] = folder = tmp_path_factory.mktemp(layout)
        settings = settings_of(TOKENIZERS["stories"], *how)
        (folder / "tokenizer.json").write_text(json.dumps(settings))
        names = dict(zip(("bos_token", "eos_token", "unk_token"), ("<s>", "</s>", "<unk>"), strict=True))
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names).save_pretrained(folder)
    source = tmp_path_factory.mktemp("source")
    (source / "tokenizer.model").write_bytes(TOKENIZERS["stories"].model)
    for legacy in (True, False):
        folders[f"theirs, legacy {legacy}"] = folder = tmp_path_factory.mktemp("theirs")
        tokenizer = LlamaTokenizer.from_pretrained(source, legacy=legacy)
        tokenizer.add_tokens(["<X>", "<X>Y"])
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(folder)
    made = {}
    for name, folder in folders.items():
        params = lf.init_params(lf.random.key(0), lf.Config(12, 1, 2, 1, 404, 10))
        lf.save(lf.Model(params, None), weights := tmp_path_factory.mktemp("weights"), format="hf")
        for file in weights.iterdir():
            file.rename(folder / file.name)
        LlamaConfig(vocab_size=404).save_pretrained(weights)
        made[name] = lf.load(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    return made


@pytest.mark.parametrize("name", [*LAYOUTS, "theirs, legacy True", "theirs, legacy False"])
@given(unicode_texts())
@example("the cat")
def test_ids_are_those_of_transformers(theirs, name, text):
    ours, other = theirs[name]
    if name not in ("prepend", "none"):
        text = text.lstrip(" \u2581")  # before a space, Metaspace leaves out the space that SentencePiece puts there
    ids = other.encode(text, add_special_tokens=False)
    assert ours.encode(text, bos=False) == ids
    assert ours.decode(ids) == other.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["theirs, legacy True", "theirs, legacy False"])
@given(unicode_texts(max_size=8), unicode_texts(max_size=8))
@example("a", " the cat")
def test_added_tokens_have_the_ids_of_transformers(theirs, name, before, after):
    ours, other = theirs[name]
    assume(not re.search("^[ \u2581]", before) and not (ours.legacy and re.search("^[ \u2581]", after)))
    assert ours.added == ((401, "<X>"), (402, "<X>Y"), (403, "<pad>")) and ours.special == (403,)
    for token in ("<X>", "<X>Y", "<pad>", "</s>", "<X>Y<X>"):
        text = f"{before}{token}{after}"
        ids = other.encode(text, add_special_tokens=False)
        assert ours.encode(text, bos=False, special=True) == ids
        assert ours.decode(ids) == other.decode(ids, skip_special_tokens=True)


# --- what is refused


def changed(settings: dict, **changes) -> dict:
    return {**settings, "model": {**settings["model"], **changes}}


@pytest.mark.parametrize("change, message", [
    (lambda x: {**x, "pre_tokenizer": {"type": "ByteLevel"}}, "a byte-level BPE, as LLaMA 3's, is no SentencePiece"),
    (lambda x: {**x, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}}, "a byte-level"),
    (lambda x: {**x, "normalizer": {"type": "NFKC"}}, "a text is prepared by NFKC; only a space"),
    (lambda x: {**x, "normalizer": None}, "a text is prepared by nothing"),
    (lambda x: {**x, "normalizer": 5}, "expected a normalizer"),
    (lambda x: {"version": "1.0"}, 'there is no "model"'), (lambda x: [x], 'there is no "model"'),
    (lambda x: changed(x, type="Unigram"), "model.type is 'Unigram', only 'BPE'"),
    (lambda x: changed(x, byte_fallback=False), "model.byte_fallback is False, only True"),
    (lambda x: changed(x, ignore_merges=True), "model.ignore_merges is True, only False"),
    (lambda x: changed(x, vocab={**x["model"]["vocab"], "hole": 1000}), "should give every piece an id from 0 on"),
    (lambda x: changed(x, vocab={"<unk>": 0}), "lacks 256 of the 256 bytes"), (lambda x: changed(x, vocab=[]), "every"),
    (lambda x: changed(x, vocab={**x["model"]["vocab"], "a" * 10**6: len(x["model"]["vocab"])}),
     "has a piece of 1,000,000 characters, at most 512 are read"),
    (lambda x: changed(x, unk_token="none"), "has no piece 'none'"),
    (lambda x: changed(x, merges=None), "model.merges is no list"),
    (lambda x: changed(x, merges=[5]), r"model.merges has \(5,\), which is no pair"),
    (lambda x: changed(x, merges=[["a", "漢字"]]), "which is no pair of pieces"),
    (lambda x: changed(x, merges=x["model"]["merges"][1:]), r"model.merges lacks .* \+ .*: a SentencePiece model"),
    (lambda x: changed(x, merges=[*x["model"]["merges"], x["model"]["merges"][0]]), "makes .* in two places"),
    (lambda x: {**x, "added_tokens": [5]}, '"added_tokens" is no list of tokens'),
    (lambda x: {**x, "added_tokens": [{"id": math.inf, "content": "a"}]}, '"added_tokens" has the id inf'),
])
def test_another_kind_of_tokenizer_is_refused_by_name(tmp_path, model, change, message):
    settings = change(settings_of(TOKENIZERS["stories"]))
    file = tmp_path / "tokenizer.json"
    lf.save(model._replace(tokenizer=None), tmp_path, format="hf")
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        lf.load_tokenizer(file)
    if isinstance(settings, dict):
        with pytest.warns(UserWarning, match=rf"tokenizer\.json: the model is loaded without a tokenizer: .*{message}"):
            assert lf.load(tmp_path).tokenizer is None


def test_a_tokenizer_that_merges_as_sentencepiece_never_does_is_refused(texts, tmp_path):
    """One of the library tokenizers' own training: of the pairs that make a piece, it knows one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="model.merges lacks"):
        lf.load_tokenizer(tmp_path / "tokenizer.json")


def test_a_pre_tokenizer_that_splits_is_read_where_no_piece_has_a_space_within():
    settings, metaspace = settings_of(TOKENIZERS["stories"]), {"type": "Metaspace", "replacement": "\u2581"}
    old_way = {"normalizer": None, "pre_tokenizer": {**metaspace, "str_rep": "\u2581", "add_prefix_space": True}}
    assert tokenizer_of_json({**settings, **old_way}) == tokenizer_of_json(settings)
    vocab = settings["model"]["vocab"]
    pairs = settings["model"]["merges"]
    alone = next(piece for piece in vocab if len(piece) == 1 and not any(piece in pair for pair in pairs))
    vocab["é\u2581é"] = vocab.pop(alone)
    with pytest.raises(ValueError, match="splits a text at spaces, and there are pieces with spaces within"):
        tokenizer_of_json({**settings, **old_way})
    for scheme, expected in (("always", True), ("first", False)):
        steps = {"normalizer": None, "pre_tokenizer": {**metaspace, "prepend_scheme": scheme, "split": False}}
        assert tokenizer_of_json({**settings, **steps}).legacy == expected


def test_the_folders_own_names_of_begin_and_end_count(model, tmp_path):
    settings = settings_of(TOKENIZERS["stories"])
    vocab = settings["model"]["vocab"]
    for old_name, name in (("<s>", "<begin>"), ("</s>", "<end>")):
        vocab[name] = vocab.pop(old_name)
    settings["added_tokens"] = []
    lf.save(model._replace(tokenizer=None), tmp_path, format="hf")
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    assert lf.load(tmp_path).tokenizer.bos_id == -1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<begin>",
                                                                "eos_token": {"content": "<end>", "lstrip": False}}))
    tokenizer = lf.load(tmp_path).tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2) and tokenizer.decode([1, 300, 2]) != ""


def test_sentencepieces_own_file_comes_first(model, tmp_path):
    lf.save(model, tmp_path, format="hf")
    assert (tmp_path / "tokenizer.json").exists() and lf.load(tmp_path).tokenizer == model.tokenizer
    Path(tmp_path / "tokenizer.model").unlink()
    assert lf.load(tmp_path).tokenizer.encode("the cat") == model.tokenizer.encode("the cat")
