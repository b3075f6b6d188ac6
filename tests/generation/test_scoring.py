"""Scoring: the log-probabilities are forward's, each token is counted once, and no batch or window changes that."""

import math

import pytest
import torch
from dialogs import talker
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import unicode_texts

import llama_fn as lf

TEXTS = ["Once upon a time there was a fox.", "", " ", "One", "Felix! 12", "Long ago there was a brave little girl"]


@pytest.fixture(scope="module")
def scorer(tokenizer) -> lf.Model:
    return talker(tokenizer, 64)


def nats_of(model, ids: list[int]) -> torch.Tensor:
    """The log-probability of every token after the first, by `forward`."""
    logits, _ = lf.forward(model.params, torch.tensor(ids))
    return logits.float().log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


def near(value):
    return pytest.approx(value, abs=1e-4)


@given(unicode_texts(max_size=15))
def test_a_score_is_the_log_softmax_of_forward(scorer, text):
    found, = lf.score(scorer, [text])
    assert found.tokens == scorer.tokenizer.encode(text) and found.replaced == 0.0
    assert found.logprobs == near([0.0, *nats_of(scorer, found.tokens).tolist()])
    assert found.bytes == len(text.encode())
    if text:
        assert found.bits_per_byte == near(lf.perplexity(scorer, text).bits_per_byte)


@given(st.permutations(TEXTS), st.integers(1, 7))
def test_batches_do_not_matter(scorer, texts, batch_size):
    alone = [lf.score(scorer, [text])[0] for text in texts]
    for one, many in zip(alone, lf.score(scorer, texts, batch_size), strict=True):
        assert one.tokens == many.tokens and one.logprobs == near(many.logprobs)
        assert one.total == math.fsum(one.logprobs)
    assert lf.score(scorer, []) == []


ENDINGS = st.sampled_from([" a fox", " a fo", " a fox.", " a fox, a fox.", "s", " the", "x 1", " "]) | unicode_texts(
    min_size=1, max_size=4)
PREFIXES = st.sampled_from([*TEXTS, "Once upon a ", "In the end s", "In the end \u6f22"])


def apart(model, prefix: str, text: str) -> tuple[list[int], list[int], int]:
    """The tokens of a prefix, those of prefix and text together, and how many they begin with in common."""
    alone, whole = model.tokenizer.encode(prefix), model.tokenizer.encode(prefix + text)
    common = 0
    while common < min(len(alone), len(whole)) and alone[common] == whole[common]:
        common += 1
    return alone, whole, common


@given(PREFIXES, st.lists(ENDINGS, min_size=1, max_size=4))
def test_an_options_total_is_the_sum_of_forwards_log_probabilities_of_its_own_tokens(scorer, prompt, options):
    for option, found in zip(options, lf.score_options(scorer, prompt, options), strict=True):
        alone, whole, common = apart(scorer, prompt, option)
        nats = nats_of(scorer, whole)[common - 1:]
        assert found.tokens == whole[common:] and found.logprobs == near(nats.tolist())
        assert found.total == near(float(nats.sum()))
        assert found.replaced == near(float(nats_of(scorer, alone)[common - 1:].sum()))
        if common == len(alone):  # the usual case: the joint merges nothing
            assert found.bytes == len(option.encode()) and found.replaced == 0
        assert found.bits_per_byte == near(-found.total / math.log(2) / found.bytes)


@given(PREFIXES, st.lists(ENDINGS, min_size=1, max_size=4))
def test_no_option_changes_anothers_numbers(scorer, prompt, options):
    together = lf.score_options(scorer, prompt, options)
    alone = [lf.score_options(scorer, prompt, [option])[0] for option in options]
    pairs = lf.score(scorer, options, 2, prefixes=[prompt] * len(options))
    for one, many, pair in zip(alone, together, pairs, strict=True):
        assert one.tokens == many.tokens == pair.tokens and one.bytes == many.bytes == pair.bytes
        assert one.logprobs == near(many.logprobs) and one.logprobs == near(pair.logprobs)
        assert one.replaced == near(many.replaced) and one.replaced == near(pair.replaced)


@given(PREFIXES, st.lists(ENDINGS, min_size=2, max_size=4))
@example("In the end s", ["he", "lept"])  # " she" takes the place of " s"
def test_log_ratios_of_options_differ_as_those_of_the_whole_texts(scorer, prompt, options):
    scores = lf.score_options(scorer, prompt, options)
    whole = lf.score(scorer, [prompt + option for option in options])
    begin, = lf.score(scorer, [prompt])
    assert all(text.total - begin.total == near(score.log_ratio) for text, score in zip(whole, scores, strict=True))


@given(st.lists(st.tuples(PREFIXES, ENDINGS), max_size=5), st.integers(1, 7))
@example([("In the end s", "he"), ("Once upon a ", "fox")], 2)  # tokens of both prefixes are replaced
def test_a_text_after_a_prefix_is_scored_as_an_option(scorer, pairs, batch_size):
    found = lf.score(scorer, [text for _, text in pairs], batch_size, prefixes=[prefix for prefix, _ in pairs])
    for (prefix, text), score in zip(pairs, found, strict=True):
        option, = lf.score_options(scorer, prefix, [text])
        assert score.tokens == option.tokens and score.logprobs == near(option.logprobs)
        assert score.bytes == option.bytes and score.replaced == near(option.replaced)


def test_an_option_may_merge_with_the_prompts_last_letters(scorer):
    prompt, options = "In the end s", ["he", "lept"]
    alone = scorer.tokenizer.encode(prompt)
    assert scorer.tokenizer.encode(prompt + "he")[:len(alone)] != alone
    he, lept = lf.score_options(scorer, prompt, options)
    whole = lf.score(scorer, [prompt + option for option in options])
    assert he.log_ratio - lept.log_ratio == near(whole[0].total - whole[1].total)
    assert [scorer.tokenizer.decode(score.tokens, continued=True) for score in (he, lept)] == [" she", "lept"]
    assert (he.bytes, lept.bytes) == (4, 4)  # of " she", which was scored, and of "lept"


def test_options_with_a_common_beginning_keep_it_in_total_and_bytes():
    kind, boy = lf.score_options(lf.load("stories"), "Once upon a time there was", [" a kind", " a kind little boy"])
    assert boy.tokens[:len(kind.tokens)] == kind.tokens
    assert (kind.bits_per_byte, boy.bits_per_byte) == (pytest.approx(0.425, abs=1e-3), pytest.approx(0.276, abs=1e-3))


def test_the_likelier_option_is_chosen():
    model = lf.load("stories")
    stone, time, river = lf.score_options(model, "Once upon a", [" stone", " time", " river"])
    assert time.total > max(stone.total, river.total) + 5


@given(unicode_texts(min_size=1, max_size=40))
def test_within_one_window_a_perplexity_is_the_score(scorer, text):
    count = len(scorer.tokenizer.encode(text)) - 1
    whole = talker(scorer.tokenizer, 400)
    found = lf.perplexity(whole, text)
    assert found.nats == near(-lf.score(whole, [text])[0].total)
    assert (found.tokens, found.bytes) == (count, len(text.encode()))
    assert lf.perplexity(whole, text, window=count, stride=1).nats == near(found.nats)
    assert found.perplexity == pytest.approx(math.exp(found.nats / count))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / len(text.encode()))


@given(unicode_texts(min_size=1, max_size=40), st.integers(1, 64), st.data())
def test_every_token_is_predicted_once_in_a_sliding_window(scorer, text, window, data):
    stride = data.draw(st.none() | st.integers(1, window))
    bos, *ids = scorer.tokenizer.encode(text)
    step, nats, reported = stride or max(1, window // 2), 0.0, []
    for i in range(len(ids)):  # the window in which token i is predicted ends with it or after it
        end = window if i < window else window + step * math.ceil((i + 1 - window) / step)
        begin = max(0, min(end, len(ids)) - window)
        nats -= float(nats_of(scorer, [bos, *ids[begin:i + 1]])[-1])
    found = lf.perplexity(scorer, text, window, stride, reported.append)
    assert found.nats == pytest.approx(nats, abs=1e-3)
    assert sum(reported) == found.tokens == len(ids) and min(reported) > 0


@given(st.integers(1, 20))
def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity(scorer, window):
    params = scorer.params._replace(output=scorer.params.output * 0)
    found = lf.perplexity(lf.Model(params, scorer.tokenizer), "Once upon a time", window)
    assert found.perplexity == pytest.approx(scorer.tokenizer.vocab_size)


def test_bad_requests_are_refused_at_once(scorer):
    long = "Once upon a time " * 40
    count = len(scorer.tokenizer.encode(long))
    with pytest.raises(ValueError, match=f"text 1 has {count} tokens, more than the model's context of 64"):
        lf.score(scorer, ["", long])
    with pytest.raises(ValueError, match=f"the prompt with option 1 has {count} tokens, more than"):
        lf.score_options(scorer, "", ["one", long])
    with pytest.raises(ValueError, match="score: texts is one text; put it in a list"):
        lf.score(scorer, "one")
    with pytest.raises(ValueError, match="score: batch_size must be at least 1, got 0"):
        lf.score(scorer, ["one"], 0)
    with pytest.raises(ValueError, match="score: prefixes is one text; put it in a list"):
        lf.score(scorer, ["one"], prefixes="On")
    with pytest.raises(ValueError, match="score: 1 prefixes for 2 texts; give one for each"):
        lf.score(scorer, ["one", "two"], prefixes=["On"])
    with pytest.raises(ValueError, match="text 1 is empty: there is nothing to score"):
        lf.score(scorer, ["one", ""], prefixes=["On", "On"])
    for options in ("ab", []):
        with pytest.raises(ValueError, match="score_options: give one option or more in a list, got "):
            lf.score_options(scorer, "One", options)
    with pytest.raises(ValueError, match="the text is empty: there is nothing to predict"):
        lf.perplexity(scorer, "")
    for window in (0, 65):
        with pytest.raises(ValueError, match=rf"window must lie in \[1, 64\], the model's context, got {window}"):
            lf.perplexity(scorer, "One", window)
    for stride in (0, 9):
        with pytest.raises(ValueError, match=rf"stride must lie in \[1, 8\], the window, got {stride}"):
            lf.perplexity(scorer, "One", 8, stride)


def test_an_empty_option_is_refused(scorer):
    with pytest.raises(ValueError, match="option 1 is empty: there is nothing to score"):
        lf.score_options(scorer, "One", [" a", ""])
