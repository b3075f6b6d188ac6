"""Kernels for a processor with AVX2 or AVX-512, in C++."""
