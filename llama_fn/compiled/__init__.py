"""Compiled steps: `jit`, `jit_layers`, kernels of a whole step, CUDA graphs; the step that generation uses."""
