"""The shipped model: what it is, and the story that it tells for a fixed key."""

from pathlib import Path

import pytest
import torch

import llama_fn as lf

GOLDEN = (Path(__file__).parent.parent / "data" / "golden.txt").read_text().removesuffix("\n")
FOLDER = Path(lf.stories.__file__).parent / "model"


@pytest.fixture(scope="module")
def stories() -> lf.Model:
    return lf.load("stories")


def test_it_tells_the_golden_story(stories):
    sample = lf.sampler(temperature=0.8)
    completion, = lf.text_completion(stories, ["Once upon a time"], key=lf.random.key(0), sampler=sample, echo=True)
    assert completion.text == GOLDEN
    assert lf.stories.derivable(GOLDEN)
    assert "Once upon a time" + "".join(lf.stream(stories, "Once upon a time", key=lf.random.key(0),
                                                  sampler=sample)) == GOLDEN


@pytest.mark.slow
def test_most_of_its_stories_could_be_the_grammars(stories):
    keys = lf.random.split(lf.random.key(5), 40)
    completions = lf.text_completion(stories, [""] * 40, key=keys)
    assert sum(lf.stories.derivable(completion.text) for completion in completions) >= 34  # of 95 % and more: the card
    assert len({completion.text for completion in completions}) == 40


def test_it_is_small_and_groups_its_query_heads(stories):
    config = stories.params.config
    assert config.n_params == sum(x.numel() for x in lf.tree.leaves(stories.params)) <= 2_000_000
    assert config.n_kv_heads > 1 and config.group_size > 1
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000
    assert {"params.json", "consolidated.00.pth", "tokenizer.model", "README.md"} <= {f.name for f in FOLDER.iterdir()}


def test_it_has_heard_of_every_story(stories):
    story = lf.stories.story(lf.random.key(7))
    tokens = stories.tokenizer.encode(story, eos=True)
    nats = float(lf.loss_sum(stories.params, torch.tensor(tokens))[0])
    assert nats < 1.3 * lf.stories.bits(story) * 0.6931 + 1  # and it is as surprised as the grammar's entropy says
