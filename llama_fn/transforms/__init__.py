"""Functions that take a function or parameters: recomputation, one gradient per sample, adapters, quantization."""
