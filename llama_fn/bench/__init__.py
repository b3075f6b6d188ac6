"""Measurements of speed: llama_fn beside this machine's own ceilings and beside other programs."""
