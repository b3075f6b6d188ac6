"""The embedded default: a grammar of children's stories, and the small LLaMAs trained on them: `model/`, and
`draft/`, a quarter of its size, for speculative decoding.
"""

from llama_fn.stories.grammar import Story, bits, derivable, stories, story

__all__ = ["Story", "bits", "derivable", "stories", "story"]
