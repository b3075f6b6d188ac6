"""The embedded default: a grammar of children's stories, and (in `model/`) the small LLaMA trained on them."""

from llama_fn.stories.grammar import Story, bits, derivable, stories, story

__all__ = ["Story", "bits", "derivable", "stories", "story"]
