"""The mathematics of LLaMA 2, one concept a file. Read norm, rope, attention, block, transformer and cache in turn."""
