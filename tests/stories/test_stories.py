import math
import re
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from chi_square import p_value
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys

from llama_fn import random, stories
from llama_fn.stories import tale
from llama_fn.stories.grammar import MOST_CHOICES, _readings

NAMES = tale.GIRLS + tale.BOYS
FRIENDS = tale.GIRL_FRIENDS + tale.BOY_FRIENDS
PRONOUNS = {"she": ["he"], "he": ["she"], "her": ["his", "him"], "his": ["her"], "him": ["her"]}


@pytest.fixture(scope="module")
def sample() -> list[stories.Story]:
    return list(stories.stories(random.key(2), 3000))


def mentions(text: str, words: Iterable[str]) -> list[re.Match]:
    return list(re.finditer(rf"\b(?:{'|'.join(words)})\b", text, re.IGNORECASE))


def swapped(text: str, place: re.Match, word: str) -> str:
    return text[:place.start()] + (word.title() if place[0].istitle() else word) + text[place.end():]


@given(keys())
def test_the_same_key_tells_the_same_story(key):
    assert stories.story(key) == stories.story(key.clone())


@given(keys())
def test_another_key_tells_another_story(key):
    assert stories.story(key) != stories.story(random.fold_in(key, 0))


@given(keys(), st.integers(0, 5))
def test_the_stories_of_a_key_are_those_of_its_children(key, count):
    many = list(stories.stories(key, count))
    assert [story.text for story in many] == [stories.story(random.fold_in(key, i)) for i in range(count)]


def test_the_stories_of_a_key_go_on_past_the_first_thousand(sample):
    assert len(sample) == 3000
    for i in (1023, 1024, 2999):
        assert sample[i].text == stories.story(random.fold_in(random.key(2), i))


@given(keys())
def test_every_story_is_derivable_and_holds_the_bits_of_its_choices(key):
    [story] = stories.stories(key, 1)
    assert stories.derivable(story.text)
    assert stories.bits(story.text) == pytest.approx(story.bits, abs=1e-9)


@given(keys())
def test_a_story_has_exactly_one_reading(key):
    assert len(list(_readings(stories.story(key)))) == 1


@pytest.mark.parametrize("words", [NAMES, tale.COLORS], ids=["name", "color"])
@given(key=keys(), data=st.data())
def test_a_name_or_color_changed_in_one_place_is_not_derivable(words, key, data):
    text = stories.story(key)
    other = data.draw(st.sampled_from([word for word in words if word not in text]))
    for place in mentions(text, words):
        first = text[:place.start()].endswith(("named ", "called "))  # a name may never be said again
        assert first or not stories.derivable(swapped(text, place, other))


@given(keys())
def test_a_pronoun_changed_in_one_place_is_not_derivable(key):
    text = stories.story(key)
    for place in mentions(text, PRONOUNS):
        for other in PRONOUNS[place[0].lower()]:
            assert not stories.derivable(swapped(text, place, other))


@given(keys(), st.data())
def test_a_character_dropped_or_added_is_not_derivable(key, data):
    text = stories.story(key)
    at = data.draw(st.integers(0, len(text) - 1))
    assert not stories.derivable(text[:at] + text[at + 1:])
    assert not stories.derivable(text[:at] + data.draw(st.characters(codec="ascii")) + text[at:])
    assert not stories.derivable(text + data.draw(st.characters()))


@given(keys(), keys(), st.data())
def test_a_sentence_dropped_added_or_repeated_is_not_derivable(key, other, data):
    sentences, others = (re.split(r"(?<=[.!]) ", stories.story(k)) for k in (key, other))
    for at in range(len(sentences)):
        assert not stories.derivable(" ".join(sentences[:at] + sentences[at + 1:]))
    at = data.draw(st.integers(0, len(sentences) - 1))
    for stranger in (sentences[at], data.draw(st.sampled_from(others))):
        assert not stories.derivable(" ".join([*sentences[:at], stranger, *sentences[at:]]))


@given(st.text() | st.sampled_from(["", "Once upon a time", "Once upon a time there was a kind little girl"]))
def test_what_is_no_story_is_not_derivable(text):
    assert stories.bits(text) == math.inf and not stories.derivable(text)


def test_a_story_names_two_at_most_and_calls_them_rightly(sample):
    for text, _ in sample:
        girl, hero = re.search(r"(girl|boy) (?:named|called) (\w+)", text).groups()
        friend = re.findall(r"(?:named|called) (\w+)", text)[1]
        assert set(re.findall(rf"\b(?:{'|'.join(NAMES + FRIENDS)})\b", text)) == {hero, friend}
        assert hero != friend
        sexes = {"girl" if name in tale.GIRLS + tale.GIRL_FRIENDS else "boy" for name in (hero, friend)}
        assert (hero in tale.GIRLS) == (girl == "girl")
        said = set(re.findall(r"\b(?:she|he|her|his|him)\b", text.lower()))
        assert "girl" in sexes or not said & {"she", "her"}
        assert "boy" in sexes or not said & {"he", "his", "him"}


@given(st.randoms(use_true_random=False))
def test_a_tale_makes_39_choices_at_most(chance):
    made = []

    def choose(options):
        made.append(chance.choice(options))
        return made[-1]

    tale.tell(tale.Voice(choose, lambda part: None))
    assert len(made) <= 39 < MOST_CHOICES


@pytest.mark.parametrize("pattern, options", [
    (r"there was a (\w+)", tale.TRAITS),
    (r"(?:girl|boy) (?:named|called) (\w+)", NAMES),
    (r"(red|blue|yellow|white|purple|pink|golden) ", [color for color in tale.COLORS if color != "green"]),
    (r"with (?:her|his) (\w+)\.", tale.FAMILY),
    (r"One (\w+) ", tale.SKIES),
    (r"(The end\.|And they were happy\.|Good night!)$", ("The end.", "And they were happy.", "Good night!")),
])
def test_every_option_of_a_choice_is_equally_likely(sample, pattern, options):
    found = Counter(m[1] for text, _ in sample if (m := re.search(pattern, text)))
    counts = torch.tensor([found[option] for option in options])
    assert p_value(counts, torch.full((len(options),), 1 / len(options))) > 1e-6


def test_every_adventure_is_equally_likely(sample):
    given, found = (sum(bool(re.search(said, text)) for text, _ in sample) for said in (
        "wanted to help|thought for a while|Wait here", "Together they found|Behind a rock|Under a bush"))
    assert p_value(torch.tensor([given, found, len(sample) - given - found]), torch.full((3,), 1 / 3)) > 1e-6


def test_a_story_holds_70_bits(sample):
    # 70.2 with a deviation of 0.9, so 5 standard errors of 3000 stories are 0.08.
    contents = torch.tensor([story.bits for story in sample])
    assert abs(contents.mean() - 70.2) < 0.08
    assert contents.min() > 68 and contents.max() < 73
