"""The tokenizers that tests run on: one trained on the stories and, where its file is at hand, LLaMA 2's."""

import os
from pathlib import Path

import pytest

import llama_fn as lf

DATA = Path(__file__).parent.parent.parent / "shared" / "data"

RELEASED = Path(os.environ.get("LLAMA2_TOKENIZER", DATA / "llama2-tokenizer.model"))

TALES = [story.text for story in lf.stories.stories(lf.random.key(0), 200)]

TOKENIZERS = {"stories": lf.train_tokenizer(TALES, 401)}

if "LLAMA2_TOKENIZER" in os.environ or RELEASED.is_file():  # Meta's license keeps it out of the repository
    TOKENIZERS["llama2"] = lf.load_tokenizer(RELEASED)

on_each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
