"""Chat templates and end tokens are read from every file that can hold them; each end token ends a generation."""

import dataclasses
import io
import json

import pytest
import torch
from dialogs import answers, dialog, plays, questions, systems, talker
from hypothesis import given
from hypothesis import strategies as st
from program import cli
from sentencepiece import SentencePieceTrainer
from templates import LLAMA2, VICUNA, ZEPHYR
from transformers import AutoTokenizer, GenerationConfig

import llama_fn as lf
from llama_fn.generation.chat import dialog_ids

PROMPT = dialog(None, [], "Who?")


@pytest.fixture(scope="module")
def small(tokenizer) -> lf.Model:
    return lf.Model(lf.tree.map(torch.Tensor.float, talker(tokenizer).params), tokenizer)


def with_files(model: lf.Model, folder, **files) -> lf.Tokenizer:
    """Save in Hugging Face's format, change some files (a dict is JSON, None removes), and load the tokenizer."""
    lf.save(model, folder, format="hf")
    for name, content in {"chat_template.jinja": None, "generation_config.json": None, **files}.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return lf.load(folder).tokenizer


@pytest.mark.parametrize("format", ["meta", "hf", "llama2c"])
@given(st.sampled_from([None, "", LLAMA2, ZEPHYR, "\r\n{{ '\u00e9' }}\n"]), st.sets(st.integers(3, 400)),
       st.sampled_from([(), (("eos_token", "x"), ("pad_token", "y"))]))
def test_what_is_saved_is_loaded(small, tmp_path_factory, format, template, ends, names):
    tokenizer = dataclasses.replace(small.tokenizer, chat_template=template, end_ids=tuple(sorted(ends)),
                                    token_names=names)
    folder = tmp_path_factory.mktemp("folder")
    other = dataclasses.replace(tokenizer, chat_template="x", end_ids=(9,))
    lf.save(small._replace(tokenizer=other), folder, format=format)
    lf.save(small._replace(tokenizer=tokenizer), folder, format=format)  # no file of the other stays
    assert lf.load(folder).tokenizer == tokenizer
    if format == "hf":
        config = GenerationConfig.from_pretrained(folder)
        assert config.eos_token_id == ([2, *sorted(ends)] if ends else 2)


@pytest.mark.parametrize("legacy", [False, True])
@given(systems, st.lists(st.tuples(questions, answers), max_size=2), questions)
def test_the_template_that_is_written_gives_metas_tokens_in_transformers(theirs, tokenizer, legacy, system, turns,
                                                                         question):
    told = dialog(system, turns, question)
    ids = theirs[legacy].apply_chat_template(told, add_generation_prompt=True, return_dict=False)
    assert ids == dialog_ids(tokenizer, told)
    with pytest.raises(Exception, match="a dialog goes"):
        theirs[legacy].apply_chat_template([{"role": "assistant", "content": "x"}])


@pytest.fixture(scope="module")
def theirs(small, tmp_path_factory) -> dict[bool, AutoTokenizer]:
    """transformers' tokenizers of folders; if `legacy`, a space comes before every part of a text."""
    read = {}
    for legacy in (False, True):
        folder = tmp_path_factory.mktemp("exported")
        lf.save(small._replace(tokenizer=dataclasses.replace(small.tokenizer, legacy=legacy)), folder, format="hf")
        read[legacy] = AutoTokenizer.from_pretrained(folder)
    return read


def test_a_template_is_read_from_every_file_the_newest_first(small, tmp_path):
    settings = json.loads((lf.save(small, tmp_path, format="hf") or tmp_path / "tokenizer_config.json").read_text())

    def template(older: object, **files) -> str:
        return with_files(small, tmp_path, **{"tokenizer_config.json": settings | {"chat_template": older}, **files}
                          ).chat_template

    assert template(None) == "" and template(VICUNA) == VICUNA
    assert template([{"name": "default", "template": ZEPHYR}]) == ZEPHYR
    assert template(VICUNA, **{"chat_template.json": {"chat_template": "j"}}) == "j"
    assert template(VICUNA, **{"chat_template.json": {"chat_template": "j"}, "chat_template.jinja": "new"}) == "new"
    for wrong, message in ((3, "chat_template should be a text, or a list of named ones, got a int"),
                           ([{"name": "rag", "template": "r"}], 'chat templates named rag, and none is named "def'),
                           ([3], "got a list")):
        (tmp_path / "chat_template.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"tokenizer_config.json: .*{message}"):
            template(wrong)


def test_a_warning_names_the_chat_templates_that_are_left_out(small, tmp_path):
    settings = json.loads((lf.save(small, tmp_path, format="hf") or tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": ZEPHYR},
             {"name": "rag", "template": "r"}]
    left_out = "the chat templates {} are left out; only the default one is used and saved"
    with pytest.warns(UserWarning) as told:
        read = with_files(small, tmp_path, **{"tokenizer_config.json": settings | {"chat_template": named}})
    assert read.chat_template == ZEPHYR
    assert [str(x.message) for x in told] == [
        f"{tmp_path / 'tokenizer_config.json'}: {left_out.format('rag, tool_use')}"]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)  # writes each named template to a file of its own
    with pytest.warns(UserWarning) as told:
        assert lf.load(tmp_path).tokenizer.chat_template == ZEPHYR
    assert [str(x.message) for x in told] == [
        f"{tmp_path / 'additional_chat_templates'}: {left_out.format('rag, tool_use')}"]


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"])
def test_a_file_elsewhere_is_not_read(small, tmp_path, name):
    lf.save(small, tmp_path / "model", format="hf")
    (tmp_path / "model" / name).rename(tmp_path / name)
    (tmp_path / "model" / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: a link to .*, outside the folder"):
        lf.load(tmp_path / "model")


@pytest.mark.parametrize(("ids", "expected"), [
    (7, (7,)), ([2, 9, 7], (7, 9)), (2, ()), (..., (11,)), (None, ()), ([], ()), ([7, 7], (7,)),
    ([-1, 9999, 7], (7,)), (0, (0,)),
])
def test_end_tokens_are_those_of_generation_config_or_else_of_config(small, tmp_path, ids, expected):
    lf.save(small, tmp_path, format="hf")
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": [2, 11]}
    told = {} if ids is ... else {"eos_token_id": ids}  # null means no end token, as in transformers
    read = with_files(small, tmp_path, **{"generation_config.json": told, "config.json": config})
    assert read.end_ids == expected and read.ends == {2, *expected}


@pytest.mark.parametrize("format", ["meta", "hf"])
def test_a_tokenizer_without_an_end_has_none_when_it_comes_back(texts, tmp_path, format):
    """`config.json` has LLaMA's end token 2, which is an ordinary token of this tokenizer."""
    out = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, model_type="bpe", vocab_size=401,
                               eos_id=-1, byte_fallback=True, normalization_rule_name="identity",
                               remove_extra_whitespaces=False, minloglevel=2)
    bare = lf.Tokenizer(out.getvalue())
    config = lf.Config(dim=12, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=401, hidden_dim=10)
    lf.save(lf.Model(lf.init_params(lf.random.key(0), config), bare), tmp_path, format=format)
    assert lf.load(tmp_path).tokenizer == bare and lf.load(tmp_path).tokenizer.ends == {-1}
    if format == "hf":
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id is None


@pytest.mark.parametrize("ids", ["2", [2, "7"], True, 2.0, [[2]], {"a": 1}])
def test_end_tokens_that_are_none_are_an_error(small, tmp_path, ids):
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id should be a token's id or a list"):
        with_files(small, tmp_path, **{"generation_config.json": {"eos_token_id": ids}})


@given(st.sets(st.integers(3, 400), min_size=1, max_size=3).flatmap(lambda ids: st.tuples(st.just(ids), st.sampled_from(
    [2, *ids]))), st.lists(st.integers(3, 400), max_size=3))
def test_every_end_token_ends_everything(tokenizer, ids, script):
    ends, end = ids
    script = [id for id in script if id not in ends]
    model = lf.Model(talker(tokenizer).params, dataclasses.replace(tokenizer, end_ids=tuple(ends)))
    key, start, asked = lf.random.key(0), len(dialog_ids(tokenizer, PROMPT)), lf.ask(model, lf.Chat(), "Who?")
    text = {"key": key, "max_new_tokens": 9, "sampler": plays(script, len(tokenizer.encode("Who?")), end)}
    said = {"key": key, "max_new_tokens": 9, "sampler": plays(script, start, end)}
    completed, = lf.text_completion(model, ["Who?"], **text)
    chatted, = lf.chat_completion(model, [PROMPT], **said)
    *_, (_, answered) = lf.answer(model, asked, **said)
    assert completed.tokens == chatted.tokens == script
    assert "".join(lf.stream(model, "Who?", **text)) == completed.text
    assert list(answered.exchanges[0].answer[:len(script)]) == script and answered.exchanges[0].answer[-1] == 2


def test_a_drafted_text_ends_at_every_end_token(tokenizer):
    model, key = talker(tokenizer), lf.random.key(5)
    whole, = lf.text_completion(model, ["Who?"], key=key, max_new_tokens=12)
    end = whole.tokens[6]
    ended = model._replace(tokenizer=dataclasses.replace(tokenizer, end_ids=(end,)))
    expected = whole.tokens[:whole.tokens.index(end)]
    assert lf.text_completion(ended, ["Who?"], key=key, max_new_tokens=12)[0].tokens == expected
    for draft in (model, ended):  # the draft's end and template do not matter
        drafted, = lf.speculate(ended, draft, ["Who?"], key=key, max_new_tokens=12)
        assert list(drafted.tokens) == expected


def test_chat_tells_of_a_missing_template_and_of_one_that_cannot_be_rendered(small, monkeypatch, capsys, tmp_path):
    lf.save(small, tmp_path / "hf", format="hf")
    monkeypatch.setattr("sys.stdin", None)
    assert cli(monkeypatch, capsys, "chat", str(tmp_path / "hf")) == (0, "", "")
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    status, _, err = cli(monkeypatch, capsys, "chat", str(tmp_path / "hf"))
    assert (status, err) == (0, f"{tmp_path / 'hf'}: this model has no chat template; LLaMA 2's format is used\n")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{% for i in")
    status, _, err = cli(monkeypatch, capsys, "chat", str(tmp_path / "hf"))
    assert status == 2 and err.startswith("llama-fn: the chat template cannot be rendered: ") and err.count("\n") == 1
