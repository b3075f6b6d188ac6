"""The embedded corpus: a grammar of children's stories, and two small LLaMAs that were trained on them.

``model/`` is the default model. ``draft/`` has a quarter of its size, and drafts for it in speculative decoding.
"""

from llama_fn.stories.grammar import Story, bits, derivable, stories, story

__all__ = ["Story", "bits", "derivable", "stories", "story"]
