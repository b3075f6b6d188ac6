"""Functions of functions and of parameters: compiled, recomputed, a sample at a time, adapted, quantized."""
