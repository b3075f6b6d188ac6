"""Implementations made of torch's own operators."""
