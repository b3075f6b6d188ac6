"""Weights and training states in and out of files; nothing from a file is ever executed."""
